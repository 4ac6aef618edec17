"""Does an error snowball? Run by hand: python tests/snowball.py FOLDER [FOLDER ...]  (models: base, warmup/, ppo/)

A false digit is written into the image level of 200 chains about clear validation images; counted is how often the third sentence
goes on from the text and how often from the image, and how often the answer repeats the third sentence's result. With statements
(warmup/, ppo/) the false sentence says level 4 or 2 in turn: counted is also what the third sentence then says of itself.
"""

import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import common
import evaluate


def follow(vlm, reader, stated: bool, n: int = 200) -> Counter:
    rng, counts, said = np.random.default_rng(5), Counter(), common.load_statements()
    for i in range(n):
        pixels, record = common.draw_digits(rng, "validation", noise=0.15)
        family = next(name for name, question in common.FAMILIES.items() if question == record["question"])
        left, right = (int(sentence[-2]) for sentence in record["reference"]["image"])
        false = next(int(d) for d in rng.permutation(10) if d not in (left, right))
        prefix = f"The left digit is {left}. The right digit is {false}."
        if stated:
            prefix = f"The left digit is {left}, {said[4][4]} The right digit is {false}, {said[4][4] if i % 2 else said[2][10]}"
        ids = vlm.tokenizer(prefix, add_special_tokens=False)["input_ids"]
        prompt = common.collate(vlm, [record | {"image": common.to_image(pixels), "id": "digits"}], [ids])
        prompt = common.Batch(prompt.inputs, prompt.responses[:, :0], prompt.mask[:, :0])
        text = vlm.tokenizer.decode(common.generate(vlm, prompt, 0.0, 60, 0)[0], skip_special_tokens=True)
        steps = reader.parse([text])[0]
        numbers = [re.findall(r"\d+", step.text) for step in steps[:2]] + [[], []]
        counts["text"] += sorted(numbers[0][:2]) == sorted(map(str, (left, false)))
        counts["image"] += sorted(numbers[0][:2]) == sorted(map(str, (left, right)))
        result = numbers[0][:1] if family == "larger" else numbers[0][-1:]
        counts["answer repeats"] += bool(result) and numbers[1] == result
        if stated and steps:
            counts[f"after level {4 if i % 2 else 2} it says {steps[0].level}"] += 1
    return counts


for folder in sys.argv[1:]:
    args = evaluate.parse_args(["--ckpt", folder, "--device", "cpu"])
    vlm, stated = common.load_model(folder, args, "cpu"), (Path(folder) / "run.json").exists()
    print(folder, dict(sorted(follow(vlm, common.StatementReader(), stated).items())))
