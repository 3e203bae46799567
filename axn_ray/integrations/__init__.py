"""axn-ray inside other people's frameworks; each module needs its own extra. All take any `axn_ray.replies.Backend`."""
