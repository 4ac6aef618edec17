"""The comparison of Table 1: every row's commands, run where they are missing, and the tables (`tables.py`).

    python tests/rows.py --seeds 0 1 2 3 4 --jobs 2             # everything, in runs/; goes on after a stop; --save FILE
    python tests/rows.py --table tests/table1.json              # the tables in the README; nothing is run
    python tests/rows.py --table runs --export tables           # of all seeds in a folder; CSV and pictures in tables/

A row is a line of ROWS, its runs are lines of RUNS: {name} is another run's folder, so rows share what they have in common. The
scripts check what is finished (settings, inputs by fingerprint) and do not repeat it. A new row is two lines:

    RUNS["strict"] = "ppo --ckpt {warmup} --beta 2"
    "R_EC twice": ("strict", "", ()),                           # in ROWS; behind it what the paper has, nothing here

On digits DPV and DPS are taught the format with confidences drawn at random, for so small a model follows no new prompt."""

import argparse
import multiprocessing
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import estimate
import evaluate
import ppo
import warmup

import conf_csr
import summary
import tables
import torch

SCRIPTS = {"estimate": estimate.main, "warmup": warmup.main, "ppo": ppo.main, "evaluate": evaluate.main, "conf_csr": conf_csr.main}
RUNS = {"estimate": "estimate", "warmup": "warmup --estimate {estimate}", "ppo": "ppo --ckpt {warmup}"}
RUNS |= {"no_rl": "warmup --estimate {estimate} --explore 0", "oracle": "warmup --estimate {estimate} --oracle"}
RUNS |= {"random": "estimate --relevel {estimate} --levels random", "dps": "warmup --estimate {random} --explore 0"}
RUNS |= {"dpv": "warmup --estimate {random} --explore 0 --no-statements", "drl": "ppo --ckpt {dps}"}
RUNS |= {"agreed": "estimate --relevel {estimate} --levels consistency", "multisample": "warmup --estimate {agreed} --explore 0"}
RUNS |= {"once": "warmup --estimate {agreed} --explore 0 --layout once", "saysself": "ppo --ckpt {once} --reward answer"}
RUNS["e_csr"] = "estimate --relevel {estimate} --weights 1 0 0 9"
RUNS["csr"] = "conf_csr --estimate {e_csr} --evaluate digits digits-ood"
RUNS |= {"after": "warmup --estimate {estimate} --layout after", "rce": "ppo --ckpt {after}"}
RUNS |= {"numbers": "warmup --estimate {estimate} --no-statements", "no_mapping": "ppo --ckpt {numbers}"}
RUNS |= {f"no_{term}": f"ppo --ckpt {{warmup}} --{weight} 0" for term, weight in (("ka", "alpha"), ("ec", "beta"), ("cs", "gamma"))}
RUNS["score"] = "ppo --ckpt {warmup} --iv score"
CHANGES = {"max": "--fuse max", "uniform": "--levels uniform", "calibrated": "--levels calibrated", "snowball": "--snowball"}
CHANGES |= {"no_lnlp": "--weights 0 1 1 1", "no_mte": "--weights 1 0 1 1"}
CHANGES |= {"no_tsar": "--weights 1 1 0 1", "no_clip": "--weights 1 1 1 0"}
for change, flags in CHANGES.items():  # of the estimate: its responses are measured already
    RUNS[f"e_{change}"] = f"estimate --relevel {{estimate}} {flags}"
    RUNS |= {f"w_{change}": f"warmup --estimate {{e_{change}}}", change: f"ppo --ckpt {{w_{change}}}"}

# row: (the run that is evaluated, flags of the evaluation, the paper's ECE, MECE, accuracy and F1 on A-OKVQA, then on CulturalVQA)
ROWS = {
    "DPV": ("dpv", "", (0.563, 0.582, 0.650, 0.512, 0.624, 0.650, 0.334, 0.482)),
    "DPS": ("dps", "", (0.511, 0.554, 0.675, 0.535, 0.572, 0.594, 0.354, 0.485)),
    "SC": ("estimate", "--consistency 10", (0.435, 0.492, 0.701, 0.548, 0.491, 0.554, 0.371, 0.511)),
    "Multisample": ("multisample", "", (0.413, 0.430, 0.683, 0.543, 0.463, 0.505, 0.362, 0.538)),
    "SaySelf": ("saysself", "", (0.345, 0.384, 0.734, 0.603, 0.375, 0.437, 0.417, 0.571)),
    "Conf-CSR": ("csr", "", (0.408, 0.437, 0.785, 0.618, 0.472, 0.513, 0.435, 0.582)),
    "RCE": ("rce", "", (0.361, 0.394, 0.788, 0.620, 0.408, 0.453, 0.412, 0.577)),
    "DRL": ("drl", "", (0.395, 0.453, 0.746, 0.614, 0.453, 0.502, 0.392, 0.564)),
    "MMBoundary": ("ppo", "", (0.316, 0.304, 0.835, 0.661, 0.337, 0.361, 0.448, 0.665)),
    "w/o U_LNLP": ("no_lnlp", "", (0.327, 0.343, 0.815, 0.642, 0.356, 0.397, 0.423, 0.639)),
    "w/o U_MTE": ("no_mte", "", (0.337, 0.332, 0.824, 0.653, 0.349, 0.378, 0.430, 0.643)),
    "w/o U_TSAR": ("no_tsar", "", (0.324, 0.358, 0.813, 0.627, 0.361, 0.403, 0.438, 0.655)),
    "w/o U_CLIPS": ("no_clip", "", (0.337, 0.354, 0.806, 0.631, 0.358, 0.394, 0.426, 0.637)),
    "w U_Max": ("max", "", (0.362, 0.386, 0.774, 0.583, 0.378, 0.425, 0.403, 0.589)),
    "w/o S-S Mapping": ("no_mapping", "", (0.340, 0.362, 0.793, 0.634, 0.365, 0.398, 0.427, 0.602)),
    "w/o R_KA": ("no_ka", "", (0.325, 0.347, 0.802, 0.629, 0.348, 0.370, 0.437, 0.632)),
    "w/o R_EC": ("no_ec", "", (0.332, 0.357, 0.819, 0.635, 0.359, 0.392, 0.422, 0.648)),
    "w/o R_CS": ("no_cs", "", (0.343, 0.368, 0.857, 0.648, 0.368, 0.417, 0.436, 0.640)),
    "UIC": ("uniform", "", (0.358, 0.387)),  # in Table 7
    "w/o RL": ("no_rl", "", (0.392, 0.427, 0.768, 0.581, 0.408, 0.456, 0.419, 0.595)),
    "calibrated cuts (ours)": ("calibrated", "", ()),
    "snowball-aware U (ours)": ("snowball", "", ()),
    "U_Final in R_CS (ours)": ("score", "", ()),
    "oracle (no method)": ("oracle", "", ()),
}
DATA = ("digits", "digits-ood")  # in and out of domain
PAPER = tables.by_data({row: numbers for row, (_, _, numbers) in ROWS.items()}, DATA)


def results(root: Path, seed: int, row: str, data: str) -> Path:
    name = f"results/{common.plain(row).replace(' ', '_')}-{data}" if row != "Conf-CSR" else f"csr/{data}"
    return root / f"seed{seed}" / name


def run_row(job: tuple) -> tuple[int, str] | None:
    """All runs of a row, one after the other; returns (seed, row) where one failed, which is named and left behind."""
    root, seed, row, options = job

    def make(name: str) -> Path:
        script, *flags = RUNS[name].split()
        flags = [str(make(flag[1:-1])) if flag[0] == "{" else flag for flag in flags]
        out = root / f"seed{seed}" / name
        with common.lock(out.with_name(".locks") / name):  # another row may be at it; what is finished is not repeated
            SCRIPTS[script]([*flags, "--seed", str(seed), "--out", str(out), *options.get(script, ())])
        return out

    torch.set_num_threads(1)
    try:
        name, flags, _ = ROWS[row]
        folder = make(name)
        of = common.read_run(folder)["setup"]
        ckpt = str(folder) if name != "estimate" else of["model"]  # the untrained model, which knows of no run
        world = ["--noise-scale", str(of["noise_scale"]), "--cache", of["cache"]]
        shared = ["--ckpt", ckpt, "--seed", str(seed), *world, *flags.split(), *options["evaluate"]]
        for data in DATA if row != "Conf-CSR" else ():  # which measures itself, on test
            evaluate.main([*shared, "--data", data, "--out", str(results(root, seed, row, data))])
    except (Exception, SystemExit):
        print(f"seed {seed}, {row}: failed\n{traceback.format_exc()}", file=sys.stderr)
        return seed, row


def collect(root: Path, seeds: list[int], failed=()) -> dict:
    """The summary of all results that are there, but those of rows that `failed` just now."""
    keys = [(data, row, seed) for data in DATA for row in ROWS for seed in seeds if (seed, row) not in failed]
    folders = {(data, row, str(seed)): results(root, seed, row, data) for data, row, seed in keys}
    return summary.collect(folders, {str(seed): root / f"seed{seed}" / "agreed" for seed in seeds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--jobs", type=int, default=1, help="rows at the same time, in processes of one thread each")
    parser.add_argument("--table", metavar="PLACE", help="run nothing: the tables of a file of --save or of a folder of runs")
    parser.add_argument("--save", type=Path, metavar="FILE", help="add the figures to those in a small JSON file")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the tables as CSV, and the pictures")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    for script in SCRIPTS:
        parser.add_argument(f"--{script}", default="", metavar="FLAGS", help=f"more flags for every {script}.py")
    args = parser.parse_args()
    if args.table in (None, "1"):  # Table 1 is what is run here
        options = {script: getattr(args, script).split() for script in SCRIPTS}
        with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
            failed = pool.map(run_row, [(args.out, s, row, options) for s in args.seeds for row in args.rows], chunksize=1)
        found = collect(args.out, args.seeds, failed)
    elif Path(args.table).is_dir():
        found = collect(Path(args.table), sorted(int(path.name[4:]) for path in Path(args.table).glob("seed[0-9]*")))
    else:
        found = common.read_object(args.table)
    tables.show(summary.save(args.save, found) if args.save else found, PAPER, args.export)


if __name__ == "__main__":
    main()
