"""Sampling by an inference server: one of the tests' own, which answers vLLM's protocol with what a real tiny model samples."""

import base64
import io
import json
import shutil
import subprocess
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import common
import estimate
import evaluate
import ppo
import warmup

import pytest
import server as engine
import torch
from peft import PeftModel
from PIL import Image
from scripted import code_and_line
from transformers import AutoModelForImageTextToText, AutoProcessor

GENERATE = common.generate  # on this side of the server
KEY = "sk-test-41b7d0c9e8a2f365"


def picture(part):
    return Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))


class SmallServer(ThreadingHTTPServer):
    """models: name -> VLM. trouble: what befalls the next chat requests, a status, "cut", a connection that ends in the middle of
    the answer, or "hang", none at all. ids: whether answers hold them. refuses adapters; serves the model `swapped` in their place.
    dies_after: so many chat requests, then every connection ends without an answer. cuts: bytes at which answers about adapters
    end."""

    daemon_threads, request_queue_size, handle_error = True, 64, lambda *_: None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.url = threading.Lock(), f"http://127.0.0.1:{self.server_port}"
        self.models, self.trouble, self.requests, self.posted = {}, [], [], []
        self.ids, self.ready, self.refuses, self.swapped, self.dies_after, self.cuts = True, True, False, None, 10**9, []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def respond(self, path, request, key):
        """-> status, JSON and the byte at which the connection ends (None: no such)."""
        if path.removeprefix("/v1/") not in ("models", "chat/completions", "load_lora_adapter", "unload_lora_adapter"):
            return 404, {}, None
        if path.endswith("/models"):
            return 200 if self.ready else 503, {"object": "list", "data": [{"id": name} for name in self.models]}, None
        if not path.endswith("/chat/completions"):
            self.posted.append((path.rsplit("/", 1)[1], request))
            if path.endswith("/unload_lora_adapter"):
                del self.models[request["lora_name"]]
            elif request["lora_name"] in self.models:
                return (
                    400,
                    {"error": {"message": "The lora adapter has already been loaded."}},
                    self.cuts.pop() if self.cuts else None,
                )
            elif not self.refuses:
                base = common.read_json(f"{request['lora_path']}/adapter_config.json")["base_model_name_or_path"]
                model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), request["lora_path"])
                vlm = common.make_vlm(model, AutoProcessor.from_pretrained(base))
                self.models[request["lora_name"]] = self.swapped or vlm
            return 404 if self.refuses else 200, "Success", self.cuts.pop() if self.cuts else None
        trouble = self.trouble.pop(0) if self.trouble else None
        if trouble == "hang":
            time.sleep(2)
        if trouble in (400, 429, 500) or len(self.requests) >= self.dies_after:
            return trouble, {"error": {"message": f"no, {key}"}}, None if trouble else 0
        self.requests.append(request)
        return 200, self.chat(request), 40 if trouble == "cut" else None

    @torch.no_grad()
    def chat(self, request):
        """n choices, each sampled with a seed of its own."""
        image, text = request["messages"][0]["content"]
        vlm, record, choices = self.models[request["model"]], {"image": picture(image), "question": text["text"]}, []
        for i in range(request["n"]):
            prompts = common.collate(vlm, [record])
            [ids] = GENERATE(vlm, prompts, request["temperature"], request["max_tokens"], request["seed"] + i)
            logprob = common.response_statistics(vlm, common.add_responses(vlm, prompts, [ids]))[0][0].tolist()
            choice = {"message": {"content": common.read_response(vlm.tokenizer, ids).text}, "token_ids": ids if self.ids else None}
            choice["finish_reason"] = "stop" if ids[-1] in vlm.end_tokens else "length"
            choices.append(choice | {"logprobs": {"content": [{"token": "", "logprob": p} for p in logprob]}})
        return {"choices": choices}


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, log_message = "HTTP/1.1", True, lambda *_: None

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"] or 0))
        with self.server.lock:
            status, body, cut = self.server.respond(self.path, json.loads(sent or "{}"), self.headers["Authorization"])
        self.close_connection, body = cut is not None, json.dumps(body).encode()
        if cut != 0:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:cut])

    do_GET = do_POST


@pytest.fixture
def server(monkeypatch):
    for module, names in ((common, ("collate", "generate")), (ppo, ("rollout", "train_update"))):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))  # as they were, afterwards
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    small = SmallServer()
    yield small
    small.shutdown()
    small.server_close()


@pytest.fixture(scope="module")
def folders(cache, tmp_path_factory):
    """The base model, its greedy chains, and an adapter that was warmed up on them."""
    folder, base = tmp_path_factory.mktemp("server"), estimate.digits_paths(cache, 0, 1.0)["model"]
    flags = f"--limit 9 --batch-size 4 --cache {cache} --device cpu --temperature 0 --max-new-tokens 40".split()
    estimate.main([*flags, "--out", f"{folder}/e"])
    lora = f"--estimate {folder}/e --lora-rank 4 --lr 0.01 --epochs 4 --batch-size 4 --device cpu --out {folder}/w"
    warmup.main(lora.split())
    return SimpleNamespace(cache=cache, base=base, flags=flags, estimate=folder / "e", warmup=folder / "w")


def one_line(capsys, main, *flags):
    """The line that a run ends with, and no other, without the key."""
    line = code_and_line(capsys, main, *flags)
    assert KEY not in line
    return line


def connect(server, vlm):
    """A client of the server, which serves `vlm`."""
    server.models["m"] = vlm
    return engine.Server(server.url, "m", 4)


def through(server, script, *flags):
    engine.main(["--server", getattr(server, "url", server), *map(str, flags)], script.__name__)


def refused(capsys, server, script, *flags):
    return one_line(capsys, lambda _: through(server, script, *flags))


def test_samples_as_generate(server, base, records):
    """Greedy chains are those of `generate`, with the model's own log-probabilities, for the pixels and text that collate shows;
    troubles that pass change nothing."""
    client, records, server.trouble = connect(server, base), records[:5], [429, 500, "cut", 500, "cut"]
    twice = [record for record in records for _ in range(2)]
    ids, said = zip(*client.sample(base, twice, 0.0, 40, 0), strict=True)
    assert list(ids) == [common.generate(base, common.collate(base, [r]), 0.0, 40, 0)[0] for r in twice] and not server.trouble
    batch = common.collate(base, twice, ids)
    with torch.no_grad():
        ours = common.response_statistics(base, batch)[0][batch.mask]
    assert torch.allclose(torch.cat(said), ours, atol=1e-4) and all(row[-1] in base.end_tokens for row in ids)
    for request in server.requests:
        assert set(request["logit_bias"]) == {"0", "1", "3"} and request["stop_token_ids"] == [2] and request["add_special_tokens"]
        assert (request["top_p"], request["top_k"], request["min_p"], request["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
    sent = [[part.get("text") or picture(part).tobytes() for part in r["messages"][0]["content"]] for r in server.requests]
    assert len(sent) == 5 + 2 and all([common.load_image(r["image"]).tobytes(), r["question"]] in sent for r in records)
    drawn, again = ([ids for ids, _ in client.sample(base, twice, 1.0, 40, 7)] for _ in range(2))
    assert drawn == again and any(drawn[i] != drawn[i + 1] for i in range(0, 10, 2))
    assert len({request["seed"] for request in server.requests}) == 10


@pytest.mark.parametrize("url", ["http://me@corp:word-7d1f@host:1", "http://me:word/7d1f@host:80a0", "http://localhost:80a0"])
def test_no_password_is_shown(url, capsys):
    line = one_line(capsys, lambda *_: engine.Server(url, "m"))
    assert "error: server http://" in line and "7d1f" not in line and "corp" not in line


@pytest.mark.parametrize("inside", ["\n", "\t", "€"])
def test_a_key_that_no_header_holds(server, base, inside, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\n")  # of a file
    connect(server, base)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}{inside}a")
    assert "OPENAI_API_KEY holds what no header can hold" in one_line(capsys, lambda *_: connect(server, base))


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_an_address(server, base, end):
    server.models["m"] = base
    assert engine.Server(server.url + end, "m", 1).base == "m"


def test_a_question_twice_in_a_batch(server, base, records):
    """Not side by side: a request each, with a seed each."""
    a, b = records[:2]
    ids = [ids for ids, _ in connect(server, base).sample(base, [a, a, b, a, a], 1.0, 40, 7)]
    assert len({request["seed"] for request in server.requests}) == 3 and ids[:2] != ids[3:]


@pytest.mark.parametrize("ids", [[], [10**6], [-1], ["5"], [7.0, 8], [7] * 41, [7, 2, 8], [7, 3]])
def test_ids_that_cannot_be(base, ids):
    assert not engine.Server.sound(base, ids, 40) and engine.Server.sound(base, [7, 8, 2], 40)


def test_an_answer_that_cannot_be(server, base, records, capsys, monkeypatch):
    client = connect(server, base)
    monkeypatch.setattr(client, "sound", lambda *_: False)
    assert "would not have sampled" in one_line(capsys, lambda *_: client.sample(base, records[:1], 0.0, 40, 0))


@pytest.mark.parametrize(
    "trouble, patience, line",
    [
        (400, 60, "fails (BadRequestError"),
        ("hang", 0.4, "fails; once it is back, the same command goes on from what is saved (Time"),
    ],
)
def test_what_lasts_and_what_passes(server, base, records, capsys, trouble, patience, line):
    server.models["m"], server.trouble = base, [trouble]
    with_password = server.url.replace("//", "//me:word-7d1f@")
    client = engine.Server(with_password, "m", 4, patience=patience)
    found = one_line(capsys, lambda *_: client.sample(base, records[:1], 0.0, 40, 0))
    assert f"error: server {server.url} {line}" in found and "word-7d1f" not in found
    assert f"server {server.url} serves m and no n" in one_line(capsys, lambda *_: engine.Server(with_password, "n"))


def test_a_name_is_a_path(server, base, tmp_path, monkeypatch):
    """The server and the run may write one folder differently."""
    monkeypatch.chdir(tmp_path)
    server.models["served/"] = base
    assert engine.Server(server.url, str(tmp_path / "served"), 1).base == "served/"


def test_nothing_is_said_of_log_probabilities(server, base):
    with pytest.warns(UserWarning, match="no log-probabilities"):
        assert torch.tensor(connect(server, base).check(torch.full((3,), torch.nan))).isnan()


def test_what_came_late_in_a_batch_is_not_diluted(server, base, records, capsys, monkeypatch):
    client, prompts = connect(server, base), common.collate(base, records)
    client.limit = client.max_mismatch = 0.01
    prompts.records, ids = records, GENERATE(base, prompts, 0.0, 10, 0)
    with torch.no_grad():
        said = [*common.response_statistics(base, common.add_responses(base, prompts, ids))[0]]
    said[-1] = said[-1] + 0.05  # .004 of all twelve, .0125 of the last four
    monkeypatch.setattr(client, "sample", lambda *_: zip(ids, said, strict=True))
    assert "mismatch = 0.0125" in one_line(capsys, lambda *_: client.generate_and_check(base, prompts, 0.0, 10, 0))


def test_what_is_another_model(server, base, capsys):
    """Far above the first mismatch, where arithmetic is exact; above --max-mismatch, where it is not."""
    exact, noisy = connect(server, base), connect(server, base)
    assert [exact.check(torch.tensor([x, -x])) for x in (1e-6, 0.0049)] == pytest.approx([1e-6, 0.0049])
    assert [noisy.check(torch.tensor([x, -x])) for x in (0.02, 0.099)] == pytest.approx([0.02, 0.099])
    for client, x, line in ((exact, 0.0051, "0.0051 nats a token, above 0.005"), (noisy, 0.11, "0.11 nats a token, above 0.1")):
        assert line in one_line(capsys, lambda _, client=client, x=x: client.check(torch.tensor([x, -x])))


@pytest.mark.parametrize("length", [60, 5])
def test_an_answer_without_ids(server, base, records, length):
    """Its text is tokenised, which is said once; only what ended is closed by an end token."""
    server.ids = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        drawn = connect(server, base).sample(base, records[:3], 0.0, length, 0)
    assert sum("gives no token ids: its texts are tokenised" in str(warning.message) for warning in caught) == 1
    for (ids, said), record in zip(drawn, records, strict=False):
        [own] = common.generate(base, common.collate(base, [record]), 0.0, length, 0)
        assert base.tokenizer.decode(ids) == base.tokenizer.decode(own) and (ids[-1] in base.end_tokens) == (length == 60)
        assert len(said) == len(ids) and said.isnan().all() == (len(ids) != len(own))


def test_estimate_and_evaluate(server, base, folders, capsys, tmp_path):
    """The same responses and statistics as without a server; an adapter is sent, and another in its place noticed."""
    server.models[folders.base], original = base, {name: getattr(common, name) for name in ("collate", "generate")}
    through(server, estimate, *folders.flags, "--out", tmp_path / "e")
    own, sampled = (common.read_jsonl(folder / "responses.jsonl") for folder in (folders.estimate, tmp_path / "e"))
    assert len(server.requests) == 9 and [line["response"] for line in own] == [line["response"] for line in sampled]
    for a, b in zip(common.all_sentences(own), common.all_sentences(sampled), strict=True):
        assert [a[name] for name in common.ESTIMATORS] == pytest.approx([b[name] for name in common.ESTIMATORS], abs=1e-4)
    flags = f"--ckpt {folders.warmup} --limit 5 --batch-size 2 --max-new-tokens 50 --device cpu --out".split()
    through(server, evaluate, *flags, tmp_path / "s")
    assert server.posted[0][1]["lora_path"] == str(folders.warmup)
    through(server, evaluate, *flags, tmp_path / "c", "--consistency", "3")
    assert server.requests[-1]["temperature"] == 1.0
    assert len(server.models) == 1 and [kind for kind, _ in server.posted] == ["load_lora_adapter", "unload_lora_adapter"] * 2
    relevel = ["--relevel", folders.estimate, "--levels", "consistency", "--samples", "2", "--device", "cpu", "--batch-size", "9"]
    through(server, estimate, *relevel, "--out", tmp_path / "agreed")
    n, away = len(server.requests), "http://127.0.0.1:9"  # which nobody asks where nothing is to be sampled
    through(away, evaluate, *flags, tmp_path / "s")
    assert "already holds this run" in capsys.readouterr().out
    assert "other settings (--server)" in one_line(capsys, evaluate.main, *flags, tmp_path / "s")
    through(away, estimate, "--relevel", folders.estimate, "--out", tmp_path / "max", "--fuse", "max")
    assert (tmp_path / "max" / "done").exists() and len(server.requests) == n
    server.swapped = base
    line = refused(capsys, f"{server.url}/v1/", evaluate, *flags, tmp_path / "x")
    assert "samples from another model: mismatch = " in line
    server.swapped, chat = None, server.chat
    for begun, kept in ((1, 0), (2, 2), (5, 4)):  # another model within the first batch, behind it, within the last
        n, out = len(server.requests), tmp_path / f"y{begun}"
        server.chat = lambda request, n=n + begun: chat(request | ({"model": folders.base} if len(server.requests) > n else {}))
        line = refused(capsys, server, evaluate, *flags, out, "--limit", "6", "--concurrency", "1")
        assert "samples from another model: mismatch = " in line
        assert len(common.read_jsonl(out / "predictions.jsonl")) == kept
    server.chat = chat
    for name in ("collate", "generate"):
        setattr(common, name, original[name])
    evaluate.main([*flags, str(tmp_path / "r")])
    own, sampled = (common.read_jsonl(tmp_path / x / "predictions.jsonl") for x in "rs")
    assert own == sampled


def test_what_ends_a_run_before_anything_loads(server, base, folders, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    flags = [estimate, *folders.flags, "--out", tmp_path / "e"]
    assert "does not answer, or not as OpenAI's do (APIConnectionError: Connection error. [Errno" in refused(
        capsys, "http://127.0.0.1:9", *flags
    )
    server.models = {"another": base}
    assert f"serves another and no {folders.base}" in refused(capsys, server, *flags)
    server.models, server.ready = {folders.base: base}, False
    assert "does not answer, or not as OpenAI's do (InternalServerError" in refused(capsys, server, *flags)
    server.ready = server.refuses = True
    assert "takes no adapter (vLLM: --enable-lora" in refused(capsys, server, ppo, "--ckpt", folders.warmup)
    server.refuses, server.cuts = False, [0] * 99
    assert "fails; once it is back, the same command goes on" in refused(capsys, server, ppo, "--ckpt", folders.warmup)
    server.cuts.clear()
    assert "full weights cannot be sent" in refused(capsys, server, ppo, "--ckpt", folders.base)
    assert "and no org/name (" in refused(capsys, server, evaluate, "--ckpt", "org/name")
    for flag, value in (("--concurrency", "0"), ("--patience", "inf"), ("--max-mismatch", "0")):
        assert "must be positive" in refused(capsys, server, *flags, flag, value)
    assert "no such folder: gone" in refused(capsys, server, ppo, "--ckpt", "gone")
    shutil.copytree(folders.warmup, tmp_path / "w", ignore=lambda *_: ["done"])
    line = refused(capsys, server, evaluate, "--ckpt", tmp_path / "w")
    assert "is not a finished run of the stage before: done missing" in line
    assert f"no model in {tmp_path}" in one_line(capsys, lambda _: engine.copy_for_vllm(tmp_path, tmp_path / "served"))


def ppo_flags(folders, out):
    flags = f"--ckpt {folders.warmup} --device cpu --max-new-tokens 50 --generate-batch 2 --updates 3 --batch-size 2 --samples 2"
    return f"{flags} --value-updates 0 --save-every 1 --lr 0.01 --out {out}".split()


def test_ppo(server, base, folders, tmp_path, capsys):
    """Each update's policy is sent under a new name and sampled. A server that dies ends the run with one line, and it goes on;
    another model in the policy's place ends it, too, and the last checkpoint is kept."""
    server.models[folders.base], server.dies_after = base, 3  # in the second update
    line = refused(capsys, server, ppo, *ppo_flags(folders, tmp_path / "p"))
    assert "fails; once it is back, the same command goes on from what is saved (APIConnectionError" in line
    assert len(common.read_jsonl(tmp_path / "p" / "log.jsonl")) == 1
    server.dies_after, before = 10**9, len(server.posted)  # it is back
    through(server, ppo, *ppo_flags(folders, tmp_path / "p"))
    log = common.read_jsonl(tmp_path / "p" / "log.jsonl")
    assert len(log) == 3 and all(row["mismatch"] < 1e-4 and row["mismatch_clipfrac"] == 0 for row in log) and log[2]["kl"] > 0
    sent = "load load unload load unload unload".split()
    assert [kind for kind, _ in server.posted[before:]] == [f"{verb}_lora_adapter" for verb in sent]
    names = [request["lora_name"] for kind, request in server.posted if kind == "load_lora_adapter"]
    assert len(set(names)) == 6 and {request["model"] for request in server.requests} == {*names[1:3], *names[4:]}
    assert {request["n"] for request in server.requests} == {2}

    def chat(request):  # another model in the second update
        return original(request | ({"model": folders.base} if len(server.requests) > 2 else {}))

    original, server.chat, server.cuts = server.chat, chat, [0]  # the answer to the first adapter is lost
    server.requests.clear()
    assert "samples from another model: mismatch = " in refused(capsys, server, ppo, *ppo_flags(folders, tmp_path / "q"))
    assert torch.load(tmp_path / "q" / "trainer_state.pt", weights_only=True)["step"] == 1


def test_more_processes_than_batches(server, base, folders, tmp_path):
    """One adapter is sent and taken away, the idle process waits for nobody, and the answers are those of one process."""
    server.models[folders.base] = base
    flags = f"--ckpt {folders.warmup} --cache {folders.cache} --limit 2 --batch-size 2 --max-new-tokens 40 --device cpu".split()
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 evaluate.py".split()
    command = [sys.executable, *torchrun, "--server", server.url, *flags, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [name for name, _ in server.posted] == ["load_lora_adapter", "unload_lora_adapter"]
    evaluate.main([*flags, "--out", str(tmp_path / "one")])
    one, two = (common.read_jsonl(tmp_path / name / "predictions.jsonl") for name in ("one", "two"))
    assert [line["response"] for line in two] == [line["response"] for line in one] and len(two) == 2
