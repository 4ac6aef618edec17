"""The comparison of Table 1: every row's commands, run where they are missing, and the table.

    python tests/rows.py --seeds 0 1 2 3 4 --jobs 2             # everything, in runs/; the same command goes on after a stop
    python tests/rows.py --rows SC MMBoundary --seeds 0
    python tests/rows.py --seeds 0 1 2 --rows SC --save figures.json     # and keep the figures of what is there
    python tests/rows.py --table tests/table1.json              # the tables in the README, no model

A row is a line of ROWS, its runs are lines of RUNS: {name} is another run's folder, so rows share what they have in common. What is
finished is checked by the scripts themselves (settings and inputs, by fingerprint) and not repeated. Intervals are 95% of the mean
over seeds (t), p is that of a t-test on MECE, paired by seed, against MMBoundary, with Holm's correction over the rows. The last
column has the paper's ECE, MECE, accuracy and F1 on A-OKVQA.

On digits DPV and DPS are taught the format with confidences that are drawn at random: a model this small follows no new prompt. DRL
starts from there. With a real model they are the prompt alone, which is not here.
"""

import argparse
import itertools
import multiprocessing
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conf_csr
import numpy as np
import torch
from scipy import stats

import common
import estimate
import evaluate
import ppo
import warmup

SCRIPTS = {"estimate": estimate.main, "warmup": warmup.main, "ppo": ppo.main, "evaluate": evaluate.main, "conf_csr": conf_csr.main}
RUNS = {
    "estimate": "estimate",
    "random": "estimate --relevel {estimate} --levels random",
    "agreed": "estimate --relevel {estimate} --levels consistency",
    "dpv": "warmup --estimate {random} --explore 0 --no-statements",
    "dps": "warmup --estimate {random} --explore 0",
    "multisample": "warmup --estimate {agreed} --explore 0",
    "once": "warmup --estimate {agreed} --explore 0 --layout once",
    "saysself": "ppo --ckpt {once} --reward answer",
    "e_csr": "estimate --relevel {estimate} --weights 1 0 0 9",
    "csr": "conf_csr --estimate {e_csr} --evaluate digits digits-ood",
    "after": "warmup --estimate {estimate} --layout after",
    "rce": "ppo --ckpt {after}",
    "drl": "ppo --ckpt {dps}",
    "warmup": "warmup --estimate {estimate}",
    "ppo": "ppo --ckpt {warmup}",
    "no_rl": "warmup --estimate {estimate} --explore 0",
    "no_ka": "ppo --ckpt {warmup} --alpha 0",
    "no_ec": "ppo --ckpt {warmup} --beta 0",
    "no_cs": "ppo --ckpt {warmup} --gamma 0",
    "numbers": "warmup --estimate {estimate} --no-statements",
    "no_mapping": "ppo --ckpt {numbers}",
    "oracle": "warmup --estimate {estimate} --oracle",
}
for change, flags in {
    "no_lnlp": "--weights 0 1 1 1",
    "no_mte": "--weights 1 0 1 1",
    "no_tsar": "--weights 1 1 0 1",
    "no_clip": "--weights 1 1 1 0",
    "max": "--fuse max",
    "uniform": "--levels uniform",
    "calibrated": "--levels calibrated",
    "snowball": "--snowball",
}.items():
    RUNS |= {
        f"e_{change}": f"estimate --relevel {{estimate}} {flags}",
        f"w_{change}": f"warmup --estimate {{e_{change}}}",
        change: f"ppo --ckpt {{w_{change}}}",
    }

# row: (the run that is evaluated, flags of the evaluation, the paper's ECE, MECE, accuracy and F1 on A-OKVQA)
ROWS = {
    "DPV": ("dpv", "", (0.563, 0.582, 0.650, 0.512)),
    "DPS": ("dps", "", (0.511, 0.554, 0.675, 0.535)),
    "SC": ("estimate", "--consistency 10", (0.435, 0.492, 0.701, 0.548)),
    "Multisample": ("multisample", "", (0.413, 0.430, 0.683, 0.543)),
    "SaySelf": ("saysself", "", (0.345, 0.384, 0.734, 0.603)),
    "Conf-CSR": ("csr", "", (0.408, 0.437, 0.785, 0.618)),
    "RCE": ("rce", "", (0.361, 0.394, 0.788, 0.620)),
    "DRL": ("drl", "", (0.395, 0.453, 0.746, 0.614)),
    "MMBoundary": ("ppo", "--bars", (0.316, 0.304, 0.835, 0.661)),
    "w/o U_LNLP": ("no_lnlp", "", (0.327, 0.343, 0.815, 0.642)),
    "w/o U_MTE": ("no_mte", "", (0.337, 0.332, 0.824, 0.653)),
    "w/o U_TSAR": ("no_tsar", "", (0.324, 0.358, 0.813, 0.627)),
    "w/o U_CLIPS": ("no_clip", "", (0.337, 0.354, 0.806, 0.631)),
    "w U_Max": ("max", "", (0.362, 0.386, 0.774, 0.583)),
    "w/o S-S Mapping": ("no_mapping", "", (0.340, 0.362, 0.793, 0.634)),
    "w/o R_KA": ("no_ka", "", (0.325, 0.347, 0.802, 0.629)),
    "w/o R_EC": ("no_ec", "", (0.332, 0.357, 0.819, 0.635)),
    "w/o R_CS": ("no_cs", "", (0.343, 0.368, 0.857, 0.648)),
    "w/o RL": ("no_rl", "", (0.392, 0.427, 0.768, 0.581)),
    "UIC": ("uniform", "", None),
    "calibrated cuts (ours)": ("calibrated", "", None),
    "snowball-aware U (ours)": ("snowball", "", None),
    "oracle (no method)": ("oracle", "", None),
}
DATA = ("digits", "digits-ood")


def results(root: Path, seed: int, row: str, data: str) -> Path:
    if row == "Conf-CSR":  # which says nothing, and measures itself
        return root / f"seed{seed}" / "csr" / data
    return root / f"seed{seed}" / "results" / f"{common.plain(row).replace(' ', '_')}-{data}"


def run_seed(job: tuple) -> None:
    """All runs of the rows, for one seed, one after the other; what fails is named and left behind."""
    root, seed, rows, options = job
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            script, *flags = RUNS[name].split()
            flags = [str(make(flag[1:-1])) if flag[0] == "{" else flag for flag in flags]
            made[name] = root / f"seed{seed}" / name
            SCRIPTS[script]([*flags, "--seed", str(seed), "--out", str(made[name]), *options.get(script, ())])
        return made[name]

    torch.set_num_threads(1)
    for row in rows:
        try:
            name, flags, _ = ROWS[row]
            folder = make(name)
            ckpt = str(folder) if name != "estimate" else common.read_run(folder)["setup"]["model"]  # the untrained model
            for data in DATA if row != "Conf-CSR" else ():
                out = str(results(root, seed, row, data))
                evaluate.main(
                    ["--ckpt", ckpt, "--data", data, "--seed", str(seed), "--out", out, *flags.split(), *options["evaluate"]]
                )
        except (Exception, SystemExit):
            print(f"seed {seed}, {row}: failed\n{traceback.format_exc()}", file=sys.stderr)


NAMES = ("ece", "mece", "brier_skill", "auroc_sentence", "reasoning", "accuracy", "f1")


def collect(root: Path, seeds: list[int]) -> dict:
    """What the tables show of every result that is there: {data: {row: {seed: NAMES and the shares of levels 1 to 5}}}."""
    found: dict = {data: {} for data in DATA}
    for data, row, seed in itertools.product(DATA, ROWS, seeds):
        path = results(root, seed, row, data) / "metrics.json"
        if path.exists():
            metrics = common.read_json(path)
            shown = {name: metrics["reasoning"]["auroc_sentence"] if name == "reasoning" else metrics[name] for name in NAMES}
            counts = [metrics["level_histogram"][str(level)] for level in range(1, 6)]
            shown["levels"] = [count / max(sum(counts), 1) for count in counts]
            found[data].setdefault(row, {})[str(seed)] = shown
    return found


def interval(values: np.ndarray) -> str:
    """Mean and half of the 95% interval (t) over seeds."""
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else np.nan
    return f"{values.mean():.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")


def holm(p: dict[str, float]) -> dict[str, float]:
    """Holm's correction of p-values (1979)."""
    corrected, worst = {}, 0.0
    for rank, row in enumerate(sorted(p, key=p.get)):
        worst = max(worst, min(1.0, p[row] * (len(p) - rank)))
        corrected[row] = worst
    return corrected


def make_table(found: dict[str, dict[str, dict]]) -> str:
    """Markdown of {row: {seed: what `collect` keeps}}."""
    ours, p = found.get("MMBoundary", {}), {}
    for row, of in found.items():
        both = sorted(set(of) & set(ours))
        if row != "MMBoundary" and len(both) > 1:
            p[row] = stats.ttest_rel([of[seed]["mece"] for seed in both], [ours[seed]["mece"] for seed in both]).pvalue
    corrected = holm(p)
    lines = ["| row | seeds | ECE↓ | MECE↓ | p | Brier skill↑ | AUROC↑ | reasoning | Acc↑ | F1↑ | levels 1-5, % | in the paper |"]
    lines.append("|" + "---|" * 12)
    for row, of in found.items():
        runs = [of[seed] for seed in sorted(of)]
        cells = [interval(np.array([np.nan if run[name] is None else run[name] for run in runs])) for name in NAMES]
        cells[2:2] = [f"{corrected[row]:.3f}" if row in corrected else ""]
        levels = " ".join(f"{100 * share:.0f}" for share in np.mean([run["levels"] for run in runs], 0))
        published = " ".join(f"{value:.3f}" for value in ROWS[row][2] or ())
        lines.append(f"| {row} | {len(of)} | {' | '.join(cells)} | {levels} | {published} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at the same time, in processes of one thread each")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of figures that --save kept, and run nothing")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the figures of the tables in a small JSON file")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    for script in SCRIPTS:
        parser.add_argument(f"--{script}", default="", metavar="FLAGS", help=f"more flags for every {script}.py")
    args = parser.parse_args()
    if not args.table:
        options = {script: getattr(args, script).split() for script in SCRIPTS}
        with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
            pool.map(run_seed, [(args.out, seed, args.rows, options) for seed in args.seeds], chunksize=1)
    found = common.read_json(args.table) if args.table else collect(args.out, args.seeds)
    if args.save:
        common.write_json(args.save, found)
    for data in DATA:
        print(f"\n{data}\n\n{make_table(found[data])}")


if __name__ == "__main__":
    main()
