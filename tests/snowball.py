"""Does an error snowball, and does doubt? Run by hand: python tests/snowball.py FOLDER [FOLDER ...]  (models: base, warmup/, ppo/)

1. A false digit is written into the image level of 200 chains about clear validation images (where statements are known, both
   digits with level 4): how often the third sentence goes on from the text, how often from the image, and how often the answer
   repeats it.
2. Where statements are known: both digits are written as they are, with planted levels, for 60 clear images and 60 hopeless ones:
   how many of the third sentences say which level. It tells doubt that is read in the words before from doubt that is seen again.
"""

import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import evaluate

import numpy as np

SAID = {
    level: [texts[i * 40 // 3] for i in range(3)] for level, texts in common.load_statements().items()
}  # those that warmup.py uses on digits


def go_on(vlm, reader, pixels: np.ndarray, record: dict, prefix: str) -> list[common.Step]:
    """The sentences that follow, greedily, on a chain that is begun already."""
    ids = vlm.tokenizer(prefix, add_special_tokens=False)["input_ids"]
    begun = common.collate(vlm, [record | {"image": common.to_image(pixels), "id": "digits"}], [ids])
    begun = common.Batch(begun.inputs, begun.responses[:, :0], begun.mask[:, :0])
    [response] = common.generate(vlm, begun, 0.0, 60, 0)
    return reader.parse([vlm.tokenizer.decode(response, skip_special_tokens=True)])[0]


def begin(digits: list[int], levels: tuple[int, ...], i: int) -> str:
    """The image level; with levels, each sentence has a statement of its own."""
    parts = [f"The {side} digit is {digit}" for side, digit in zip(("left", "right"), digits, strict=True)]
    said = [f", {SAID[level][(i + n) % 3]}" for n, level in enumerate(levels)] or [".", "."]
    return " ".join(part + after for part, after in zip(parts, said, strict=True))


def follow(vlm, reader, stated: bool, n: int = 200) -> Counter:
    rng, counts = np.random.default_rng(5), Counter()
    for i in range(n):
        pixels, record = common.draw_digits(rng, "validation", noise=0.15)
        family = next(name for name, question in common.FAMILIES.items() if question == record["question"])
        left, right = (int(sentence[-2]) for sentence in record["reference"]["image"])
        false = next(int(d) for d in rng.permutation(10) if d not in (left, right))
        steps = go_on(vlm, reader, pixels, record, begin([left, false], (4, 4) * stated, i))
        numbers = [re.findall(r"\d+", step.text) for step in steps[:2]] + [[], []]
        counts["text"] += sorted(numbers[0][:2]) == sorted(map(str, (left, false)))
        counts["image"] += sorted(numbers[0][:2]) == sorted(map(str, (left, right)))
        result = numbers[0][:1] if family == "larger" else numbers[0][-1:]
        counts["answer repeats"] += bool(result) and numbers[1] == result
    return counts


def doubt(vlm, reader, noise: float, levels: tuple[int, int], n: int = 60) -> Counter:
    rng, counts = np.random.default_rng(5), Counter()
    for i in range(n):
        pixels, record = common.draw_digits(rng, "validation", noise=noise)
        digits = [int(sentence[-2]) for sentence in record["reference"]["image"]]
        steps = go_on(vlm, reader, pixels, record, begin(digits, levels, i))
        counts[str(steps[0].level) if steps else "nothing"] += 1
    return counts


for folder in sys.argv[1:]:
    args = evaluate.parse_args(["--ckpt", folder, "--device", "cpu"])
    vlm, stated, reader = common.load_model(folder, args, "cpu"), (Path(folder) / "run.json").exists(), common.StatementReader()
    print(folder, dict(sorted(follow(vlm, reader, stated).items())))
    for noise in (min(common.NOISE), max(common.NOISE)) * stated:
        for levels in ((4, 4), (4, 3), (3, 3), (2, 2)):
            counts = dict(sorted(doubt(vlm, reader, noise, levels).items()))
            print(f"  noise {noise:g}, said at levels {levels}: the third sentence says {counts}")
