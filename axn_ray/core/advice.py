"""The examiner's advice: what an evaluation says about these data, in plain sentences.

Reads the summary. Knows no search and no files.
"""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from axn_ray.core.comparison import Row
from axn_ray.errors import InputError

# A difference in nDCG@10 or accuracy below this is not worth a sentence.
NOTICEABLE = 0.02


class AdviceConfig(BaseModel):
    """What is wanted, and for how many queries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recall: float = Field(0.8, gt=0, le=1, description="share of the exact top k that is to be found, on average")
    k: int = Field(10, ge=1, description="of that top k; one that was evaluated")
    queries: int = Field(100_000, ge=1, description="queries over which the index's CE calls are spread")


def advise(summary: Sequence[Row], counts: Mapping[str, float], config: AdviceConfig) -> list[str]:
    """Sentences, the answer first: the cheapest way, what it saves over retrieve-and-rerank, and what the labels say.

    `counts` are the evaluation's: `items`, and `exact_accuracy` where there were labels. Cost is CE calls per query plus
    the index's CE calls shared out over `queries`; methods whose index calls are not known are left out.

    Raises:
        InputError: k was not evaluated, or of no method it is known what its index cost.
    """
    rows = [row for row in summary if row["k"] == config.k]
    if not rows:
        ks = ", ".join(str(k) for k in sorted({row["k"] for row in summary}))
        raise InputError(f"k={config.k} was not evaluated, only {ks}; name one of these or evaluate again")
    rows = [row for row in rows if row["index_ce_calls"] is not None]
    if not rows:
        raise InputError("of no method is it known what its index cost in CE calls; factorize again with this version")
    goal = f"{100 * config.recall:g} % of the exact top {config.k}"
    reaching = sorted((row for row in rows if row["recall"] >= config.recall), key=lambda row: _cost(row, config))
    if not reaching:
        best = max(rows, key=lambda row: row["recall"])
        least = f"{100 * best['recall']:.1f} % is the most, with {_name(best)}"
        return [
            f"No method that was evaluated finds {goal}: {least}. Raise the budgets or score more train pairs.",
            *_judge_labels(rows, best, counts),
        ]
    chosen = reaching[0]
    sentences = [_recommend(chosen, goal, config, counts)]
    if chosen["recall_low"] < config.recall:
        surely = next((row for row in reaching if row["recall_low"] >= config.recall), None)
        sentences.append(_warn(chosen, surely, config))
    rerank = next((row for row in reaching if row["rounds"] == 1), None)
    if rerank is chosen:
        sentences.append("Plain retrieve-and-rerank is enough here: nothing that searches adaptively gets there for less.")
    else:
        sentences.append(_compare(chosen, rerank, rows, config))
    return [*sentences, *_judge_labels(rows, chosen, counts)]


def _cost(row: Row, config: AdviceConfig) -> float:
    return float(row["ce_calls"] + row["index_ce_calls"] / config.queries)


def _name(row: Row) -> str:
    rounds = f" in {row['rounds']} rounds" if row["rounds"] > 1 else ""
    return f"{row['method']} with B={row['budget']}{rounds}"


def _bounds(row: Row) -> str:
    return f"{100 * row['recall']:.1f} % ({100 * row['recall_low']:.0f}–{100 * row['recall_high']:.0f})"


def _recommend(row: Row, goal: str, config: AdviceConfig, counts: Mapping[str, float]) -> str:
    index = row["index_ce_calls"]
    shared = f"{index / config.queries:.1f} a query over {config.queries:,} queries"
    offline = f"{index:,} for the index, {shared}" if index else "none offline"
    speed = counts.get("ce_calls_per_second")
    seconds = f", about {row['ce_calls'] / speed:.2f} s on one worker as the truth was scored" if speed else ""
    calls = f"{row['ce_calls']:.0f} CE calls a query{seconds} ({offline})"
    return f"To find {goal}, take {_name(row)}: it finds {_bounds(row)} for {calls}."


def _warn(chosen: Row, surely: Row | None, config: AdviceConfig) -> str:
    low = f"Its 95 % interval reaches down to {100 * chosen['recall_low']:.0f} %"
    if surely is None:
        return f"{low}, and no row lies above {100 * config.recall:g} % with its whole interval; evaluate more queries."
    return f"{low}; the cheapest whose whole interval lies above is {_name(surely)}, which finds {_bounds(surely)}."


def _compare(chosen: Row, rerank: Row | None, rows: Sequence[Row], config: AdviceConfig) -> str:
    if rerank is not None:
        share = 1 - _cost(chosen, config) / _cost(rerank, config)
        saved = f"saves {100 * share:.0f} % of all calls over {config.queries:,} queries"
        return f"Retrieve-and-rerank gets there with {_name(rerank)}: the adaptive search {saved}."
    flat = max((row for row in rows if row["rounds"] == 1), key=lambda row: row["recall"], default=None)
    if flat is None:
        return "Retrieve-and-rerank was not evaluated; add rnr_de to the methods to see whether it would do."
    return f"Retrieve-and-rerank gets there with no budget that was evaluated: {_bounds(flat)} is its best, with {_name(flat)}."


def _judge_labels(rows: Sequence[Row], chosen: Row, counts: Mapping[str, float]) -> list[str]:
    """Whether being closer to the CE also means better answers by the labels, where there are any."""
    if "exact_accuracy" not in counts:
        return []
    exact, best = counts["exact_accuracy"], max(rows, key=lambda row: row["accuracy"])
    over = f"The CE itself, over all {counts['items']:,} items,"
    says = f"{over} puts the labelled item first for {100 * exact:.0f} % of the queries"
    if best["accuracy"] > exact + NOTICEABLE:
        less = f"{_name(best)} does so for {100 * best['accuracy']:.0f} %"
        return [f"{says}, and {less}: on these data the CE disagrees with the labels, and a closer copy of it answers no better."]
    if chosen["accuracy"] < exact - NOTICEABLE:
        return [f"{says}, {_name(chosen)} for {100 * chosen['accuracy']:.0f} %: a larger budget would still answer better."]
    return [f"{says}, {_name(chosen)} for {100 * chosen['accuracy']:.0f} %: by the labels more CE calls gain little."]
