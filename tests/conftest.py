"""One Ray session for all tests of a process; the environment is set before Ray is imported."""

import os
from pathlib import Path

os.environ.pop("RAY_ADDRESS", None)
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_memory_usage_threshold="0.98",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5",  # a report waits for the next look, which is every two seconds by default
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HAYSTACK_TELEMETRY_ENABLED="false",
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    PYTHONPATH=str(Path(__file__).parent.parent),  # Ray's workers open cross-encoders that stand in tests
)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).parent
LONGEST = ["test_notebooks.py", "test_documents.py", "distributed/test_factorize.py", "distributed/test_distill.py"]


def pytest_collection_modifyitems(items):
    """What takes minutes starts first, so that two processes, which take whole files, end at about the same time."""
    places = {ROOT / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray with 8 logical CPUs."""
    import ray

    from axn_ray.distributed.cluster import join_cluster

    ray.init(
        "local", num_cpus=8, include_dashboard=False, object_store_memory=512 * 2**20, log_to_driver=False, logging_level="error"
    )
    join_cluster()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_cross_encoder(tmp_path_factory):
    """Folder of a two-layer BERT with one logit, random weights and the real MiniLM vocabulary."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from axn_ray.core.models import MINILM, locate_model

    folder = tmp_path_factory.mktemp("tiny_cross_encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(locate_model(MINILM))
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return folder
