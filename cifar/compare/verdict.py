"""What the numbers of a comparison say, in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from cifar.compare.statistics import Difference

Contender = Mapping[str, Any]


def verdict(difference: Difference, contenders: Sequence[Contender], pairs: int) -> dict[str, str]:
    """`kind` and `sentence`. The kind is `holds`, `open` if the two cannot be told apart, or `these` if the difference
    is one of these very runs, since the variance over seeds is unknown."""
    first, second = (contenders[place] for place in (difference.first, difference.second))
    low, high = difference.interval
    size = f"{points(difference.difference)} points, 95 % interval {points(low)} to {points(high)}"
    size += f"; {probability(difference.p_holm)}" + f" after Holm's correction for {pairs} pairs" * (pairs > 1)
    once = [one["name"] for one in (first, second) if not one["seeds_known"]]
    unknown = f"What another seed would change is unknown, since {listing(once)} ran once."
    if difference.holds and not once:
        return {"kind": "holds", "sentence": f"{first['name']} is ahead of {second['name']}: {size}."}
    if difference.holds:
        sentence = f"The run of {first['name']} is ahead of that of {second['name']} on these images: {size}. {unknown}"
        return {"kind": "these", "sentence": sentence}
    if difference.same:
        sentence = f"{first['name']} and {second['name']} are right on the very same images, run by run."
        return {"kind": "open", "sentence": sentence}
    counts = sorted({one["n"] for one in (first, second) if one["varies"]})
    seeds = f" with {' and '.join(map(str, counts))} seed{'s' * (counts != [1])}" if counts else ""
    sentence = f"{first['name']} and {second['name']} cannot be told apart{seeds}: {size}."
    if low > 0:
        sentence += " This pair alone would differ; among so many, one does by chance too often."
    if once:
        sentence += f" {unknown}"
    elif difference.seeds_needed:
        sentence += f" About {difference.seeds_needed} seeds of each would tell, if the difference stays as it is."
    elif difference.difference:
        sentence += " More seeds alone would not tell, if it stays as it is: that takes more test images."
    return {"kind": "open", "sentence": sentence}


def headline(summary: Mapping[str, Any]) -> list[str]:
    """What came out, how sure that is, and what is missing: a paragraph each."""
    ranked = [one for one in summary["contenders"] if one["rank"]]
    if not ranked:
        return ["No run came to an end, so there is nothing to rank."]
    paragraphs = [_best(summary, ranked), _sources(ranked), *summary["remarks"], *_missing(summary)]
    return [paragraph for paragraph in paragraphs if paragraph]


def _best(summary: Mapping[str, Any], ranked: Sequence[Contender]) -> str:
    best = ranked[0]
    over = f"the mean of {best['n']} seeds" if best["n"] > 1 else "of one run"
    low, high = best["interval"]
    text = (
        f"{best['name']} has the highest test accuracy: {share(best['mean'])}, {over}, 95 % interval {share(low)} to "
        f"{share(high)}."
    )
    mine = [pair for pair in summary["pairs"] if pair["first"] == best["name"]]
    behind = [pair["second"] for pair in mine if pair["verdict"]["kind"] == "holds"]
    these = [pair["second"] for pair in mine if pair["verdict"]["kind"] == "these"]
    same = [pair["second"] for pair in mine if pair["verdict"]["kind"] == "open"]
    if behind:
        text += f" It is ahead of {listing(behind)}, by more than seeds and images explain."
    if these:
        text += f" On these images its run is ahead of {listing(these)}; whether other seeds repeat that is unknown."
    if same:
        text += f" From {listing(same)} it cannot be told apart."
    return text


def _sources(ranked: Sequence[Contender]) -> str:
    """Seeds against images."""
    known = [one for one in ranked if one["varies"] and one["seed_sd"] is not None]
    if not known:
        return ""
    seeds, images = ([one[name] for one in known] for name in ("seed_sd", "sampling_sd"))
    more = [one["name"] for one in known if one["seed_sd"] > one["sampling_sd"]]
    text = (
        f"Another seed changes a run's accuracy by {_range(seeds)} points (standard deviation), other test images of "
        f"this number by {_range(images)}."
    )
    if len(more) == len(known):
        return f"{text} Seeds are the larger part."
    return f"{text} {f'Seeds are the larger part for {listing(more)} only' if more else 'Images are the larger part'}."


def _missing(summary: Mapping[str, Any]) -> list[str]:
    """What the reader must not overlook."""
    found = []
    once = [one["name"] for one in summary["contenders"] if one["rank"] and not one["seeds_known"]]
    if once:
        found.append(
            f"{listing(once)} ran with one seed: how much another seed would change is unknown, and no interval or "
            "test of theirs has it. The same command with more --seeds goes on."
        )
    runs = [run for one in summary["contenders"] for run in one["runs"]]
    lost = [run for run in runs if run["accuracy"] is None]
    if lost:
        failed = [one["name"] for one in summary["contenders"] if not one["rank"]]
        text = f"{len(lost)} of {len(runs)} runs did not come to an end and count nowhere."
        found.append(text + f" Of {listing(failed)} there is none at all." * bool(failed))
    return found


def points(value: float) -> str:
    """Of a difference of shares, in percentage points."""
    return f"{100 * value:.2f}"


def share(value: float) -> str:
    return f"{100 * value:.2f} %"


def probability(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}" if p < 0.1 else f"p = {p:.2f}"


def listing(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _range(values: Sequence[float]) -> str:
    low, high = points(min(values)), points(max(values))
    return low if low == high else f"{low} to {high}"
