"""Online search on Ray Serve: an ingress, a retriever and a cross-encoder behind one HTTP app."""
