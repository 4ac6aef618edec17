"""What can eq. 11 and 12 buy at best? Run by hand: python tests/ceiling.py FOLDER  (a run of estimate.py)

A policy that tells right sentences from wrong ones, sure of it by 95% (or 80%), states the level that the rewards pay best, on the
sentences of the training responses with their internal confidence (of either reading, `ppo.py --iv`): the level nearest to the mean
of what it knows and the internal confidence, weighted by beta and gamma. Its MECE is as far as a policy can come that follows its
rewards alone.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import evaluate
import ppo

import numpy as np

SAID = [common.Step("", 0, 0, 0, level=level) for level in evaluate.LEVELS]


@functools.cache
def best_level(known: float, internal: float, beta: float, gamma: float) -> int:
    """The level whose expected R_EC and R_CS, by the chance `known` that the sentence is right, pay best; of equals the lower."""
    wrong, right = (ppo.sentence_rewards(SAID, np.full(5, truth), np.full(5, internal)).numpy() for truth in (0, 1))
    pay = ((1 - known) * wrong + known * right) @ [0, beta, gamma]
    return evaluate.LEVELS[int(np.argmax(pay.round(6)))]


def ceiling(lines: list[dict], sure: float, beta: float, gamma: float, iv: str = "level") -> tuple[float, np.ndarray]:
    """-> MECE of that policy on the responses of responses.jsonl, and its shares of the five levels."""
    stated = []
    for line in lines:
        known = [sure if s["correct"] else 1 - sure for s in line["sentences"]]
        internal = [common.conf(s["level"]) if iv == "level" else 1 - s["u"] for s in line["sentences"]]
        levels = [best_level(p, value, beta, gamma) for p, value in zip(known, internal, strict=True)]
        stated.append({"sentences": [s | {"level": level} for s, level in zip(line["sentences"], levels, strict=True)]})
    said = [sentence["level"] for line in stated for sentence in line["sentences"]]
    return evaluate.mece(stated), np.bincount(said, minlength=6)[1:] / len(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("estimate", type=Path)
    lines = common.read_jsonl(parser.parse_args().estimate / "responses.jsonl")
    print(f"MECE of the best level: {evaluate.mece_constant(lines)[0]:.3f}\n\n| IV | beta | gamma | sure | MECE | levels 1-5, % |")
    print("|---|---|---|---|---|---|")
    for iv, beta, gamma in (("level", 1, 1), ("score", 1, 1), ("–", 1, 0), ("level", 0, 1), ("score", 0, 1)):
        for sure in (0.8, 0.95):
            mece, shares = ceiling(lines, sure, beta, gamma, iv)
            print(f"| {iv} | {beta} | {gamma} | {sure} | {mece:.3f} | {' '.join(f'{100 * share:.0f}' for share in shares)} |")


if __name__ == "__main__":
    main()
