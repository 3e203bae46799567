import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from axn_ray.core.causal_cross_encoder import CausalCrossEncoder
from axn_ray.core.cross_encoder import CrossEncoder
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.open_cross_encoder import open_cross_encoder
from axn_ray.core.prompt import QWEN3_INSTRUCTION, QWEN3_TEMPLATE
from axn_ray.errors import InputError, ModelError

QUERIES = ["he [ran] home", "what is a bank?", 'they said "yes."', "a"]
ITEMS = ["run: move fast", "close: shut.", "x", "bank: " + "a long definition of a bank (or of two), " * 3]
# Qwen's own: a mark takes the line end after it into its token, a word the blank before it.
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([QWEN3_TEMPLATE, *QUERIES, *ITEMS, "yes no yes no", "what?\nso.\nto)\n" * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", model_max_length=512)


@pytest.fixture(scope="module")
def tiny_causal(tmp_path_factory):
    """Folder of a two-layer Qwen3 with random weights and a byte-level BPE that cuts texts as Qwen's does."""
    folder = tmp_path_factory.mktemp("tiny_causal")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    config = Qwen3Config(num_attention_heads=4, head_dim=8, max_position_embeddings=512, initializer_range=0.3, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def opened(folder, **settings):
    scorer = open_cross_encoder(CrossEncoderConfig(cross_encoder=str(folder), **{"dtype": "float32"} | settings))
    assert isinstance(scorer, CausalCrossEncoder)
    return scorer


def model_card_scores(folder, pairs, no_token="no", template=QWEN3_TEMPLATE):
    """The slow twin, one pair at a time: the whole text through the tokenizer, all logits of the last position."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    scores = []
    for query, item in pairs:
        text = template.replace("{instruction}", QWEN3_INSTRUCTION).replace("{query}", query).replace("{item}", item)
        with torch.inference_mode():
            logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1]
        yes, no = (logits[tokenizer.convert_tokens_to_ids(name)].item() if name else 0.0 for name in ("yes", no_token))
        scores.append(yes - no)
    return np.array(scores, dtype=np.float32)


def all_pairs():
    return np.repeat(np.arange(4, dtype=np.int32), 4), np.tile(np.arange(4, dtype=np.int32), 4)


@pytest.mark.parametrize("batch_tokens", [1, 300, 4096])
@pytest.mark.parametrize("no_token", ["no", ""])
def test_equals_the_model_card_pair_by_pair(tiny_causal, batch_tokens, no_token):
    scorer = opened(tiny_causal, batch_tokens=batch_tokens, no_token=no_token)
    query_index, item_index = all_pairs()
    scores = scorer.score(scorer.tokenize_queries(QUERIES), scorer.tokenize(ITEMS), query_index, item_index)
    asked = [(QUERIES[q], ITEMS[i]) for q, i in zip(query_index, item_index, strict=True)]
    expected = model_card_scores(tiny_causal, asked, no_token)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_the_published_probability_is_the_sigmoid_of_the_score(tiny_causal):
    """Qwen3-Reranker's card takes exp(log_softmax([no, yes])[1])."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_causal), AutoModelForCausalLM.from_pretrained(tiny_causal).eval()
    text = QWEN3_TEMPLATE.format(instruction=QWEN3_INSTRUCTION, query=QUERIES[1], item=ITEMS[0])
    with torch.inference_mode():
        logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1]
    published = torch.log_softmax(logits[tokenizer.convert_tokens_to_ids(["no", "yes"])], 0)[1].exp().item()
    score = opened(tiny_causal).score_texts(QUERIES[1:2], ITEMS[:1])[0]
    assert 1 / (1 + np.exp(-score)) == pytest.approx(published, abs=1e-6)


def test_bfloat16_keeps_the_resolution_of_its_scores(tiny_causal):
    query_index, item_index = all_pairs()
    exact, fast = (opened(tiny_causal, dtype=dtype) for dtype in ("float32", "bfloat16"))
    expected = exact.score(exact.tokenize_queries(QUERIES), exact.tokenize(ITEMS), query_index, item_index)
    scores = fast.score(fast.tokenize_queries(QUERIES), fast.tokenize(ITEMS), query_index, item_index)
    np.testing.assert_allclose(scores, expected, atol=0.1 * np.abs(expected).max())
    assert (torch.from_numpy(scores).bfloat16().float().numpy() != scores).all()


def test_positions_that_are_learned_are_those_of_the_text_alone(tiny_causal, tmp_path):
    """GPT-2 adds its positions: a row that were padded on the left would move them."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    template = "Query: {query}\nText: {item}\n<|endoftext|>"
    expected = model_card_scores(tmp_path, list(zip(QUERIES, ITEMS, strict=True)), template=template)
    np.testing.assert_allclose(opened(tmp_path, template=template).score_texts(QUERIES, ITEMS), expected, atol=1e-5)


def test_long_items_are_cut_or_chunked_inside_the_template(tiny_causal):
    words = "run move fast close shut definition".split()
    free = opened(tiny_causal)
    room = 40
    query_tokens = len(free.tokenize_queries(["a"])[0])
    lengths = [len(free.tokenize([word])[0]) for word in words]
    assert room - query_tokens > sum(lengths[:2])
    limit = free._template.n_special + query_tokens + sum(lengths[:2])
    rows = np.zeros(1, dtype=np.int32)
    cut = opened(tiny_causal, max_length=limit)
    scored = cut.score_pairs(cut.tokenize_queries(["a"]), cut.tokenize([" ".join(words)]), rows, rows)
    assert scored.n_truncated == 1
    np.testing.assert_allclose(scored.scores, free.score_texts(["a"], ["run move"]), atol=1e-5)
    with pytest.raises(InputError, match="raise max_length or set overlong"):
        opened(tiny_causal, max_length=limit, overlong="error").score_texts(["a"], [" ".join(words)])
    chunked = opened(tiny_causal, max_length=limit, overlong="chunk-max").score_texts(["a"], [" ".join(words)])
    assert chunked >= scored.scores - 1e-5


def test_texts_without_words_fail_alone(tiny_causal):
    scorer = opened(tiny_causal)
    rows = np.arange(3, dtype=np.int32)
    scored = scorer.score_pairs(scorer.tokenize_queries(["a", " ", "c"]), scorer.tokenize(["x", "y", ""]), rows, rows)
    assert scored.failures == {1: "the query has no text", 2: "the item has no text"}
    assert np.isfinite(scored.scores[0])


def test_fingerprint_holds_all_that_scores_depend_on(tiny_causal):
    other = QWEN3_TEMPLATE.replace("Judge", "Say")
    settings = [{}, {"no_token": ""}, {"yes_token": "no", "no_token": "yes"}, {"template": other}, {"instruction": "Find it"}]
    assert len({str(opened(tiny_causal, **some).fingerprint) for some in settings}) == 5


def test_what_cannot_be_read_is_refused_in_one_sentence(tiny_causal):
    with pytest.raises(ModelError, match="has no token 'maybe'"):
        opened(tiny_causal, yes_token="maybe")
    with pytest.raises(InputError, match="must hold {query} and {item}, each once"):
        opened(tiny_causal, template="{query}")
    with pytest.raises(InputError, match="put the query first"):
        opened(tiny_causal, template="{item}\n{query}\n")
    with pytest.raises(ModelError, match="let a line end or a special token follow {query} and {item}"):
        opened(tiny_causal, template="{query}s\n{item}\n")
    with pytest.raises(ModelError, match=r"max_length=20 has no room beside the template's \d+ tokens"):
        opened(tiny_causal, max_length=20)


def test_a_model_that_was_never_trained_to_score_is_refused(tiny_causal):
    with pytest.raises(ModelError, match="has no weights for score.weight, so its scores would be random"):
        CrossEncoder(CrossEncoderConfig(cross_encoder=str(tiny_causal)))


def test_an_adapter_of_a_causal_model_is_merged_into_its_base(tiny_causal, tmp_path):
    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_causal), LoraConfig(r=4, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    tokenizer.save_pretrained(tmp_path)
    text = QWEN3_TEMPLATE.format(instruction=QWEN3_INSTRUCTION, query=QUERIES[0], item=ITEMS[0])
    with torch.inference_mode():
        logits = adapted.eval()(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1]
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    assert opened(tmp_path).score_texts(QUERIES[:1], ITEMS[:1])[0] == pytest.approx((logits[yes] - logits[no]).item(), abs=1e-4)
