"""Reference chains through a real HTTP server that speaks the chat completions protocol."""

import base64
import json
import multiprocessing
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import common

import annotate
import numpy as np
import pytest

pytest.importorskip("openai")

KEY = "sk-test-7f3a9c51d2e84b60"
CHAIN = {"image": ["The left digit is 3.", "The sky is blue."], "reasoning": ["3 plus 5 is 8", "So, the answer is 8"]}
REFINED = {"image": ["The left digit is 3."], "reasoning": ["So, the answer is 8."]}


class Endpoint(ThreadingHTTPServer):
    """Answers with what `script(request, attempt)` returns: a text, a dict (merged into the choice), (status, headers) or bytes.

    `request` has the messages and the `question`; `attempt` counts the requests for this question from 0.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.requests, self.running, self.peak, self.delay = threading.Lock(), [], 0, 0, 0.0
        self.script = lambda request, attempt: json.dumps([CHAIN, REFINED][attempt % 2])
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients that were killed

    def asked(self, question):
        return [r for r in self.requests if r["question"] == question]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_POST(self):
        request, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        image, text = sorted(request["messages"][0]["content"], key=lambda part: part["type"])
        request |= {"path": self.path, "key": self.headers["Authorization"], "text": text["text"], "url": image["image_url"]["url"]}
        request |= {"question": re.findall(r"^Question: (.*)$", text["text"], re.M)[-1], "time": time.monotonic()}
        with server.lock:
            attempt = len(server.asked(request["question"]))
            server.requests.append(request)
            server.running += 1
            server.peak = max(server.peak, server.running)
        time.sleep(server.delay)
        answer = server.script(request, attempt)
        with server.lock:
            server.running -= 1
        status, headers = answer if isinstance(answer, tuple) else (200, {})
        if isinstance(answer, tuple):
            body = json.dumps({"error": {"message": f"refused {self.headers['Authorization']}", "code": None}}).encode()
        elif isinstance(answer, bytes):
            body = answer
        else:
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
            choice = answer if isinstance(answer, dict) else choice
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def endpoint(monkeypatch):
    server = Endpoint()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def make(tmp_path):
    """-> n records with an image each, named q0, q1, ..., as load_data gives them."""

    def records(n):
        image = tmp_path / "images" / "000000000042.png"
        image.parent.mkdir(exist_ok=True)
        common.to_image(common.draw_digits(np.random.default_rng(0), "train")[0]).save(image)
        blank = {"image": str(image), "choices": ["7", "8"], "answer": "8", "answers": ["8", "eight"]}
        blank["reference"] = {"image": ["The key."], "reasoning": ["The key."]}
        return [{"id": f"q{i}", "question": f"What is {i} {{here}}?"} | blank for i in range(n)]

    return records


@pytest.fixture
def args(tmp_path, endpoint):
    args = annotate.parse_args(["--out", str(tmp_path / "out"), "--limit", "10", "--model", "some-model"])
    assert args.concurrency == 8 and args.price is None
    args.device = "cpu"
    return args


def results(args):
    out = Path(args.out)
    return common.read_json(out / "train_mmb.json"), *(common.read_jsonl(out / f"{name}.jsonl") for name in ("annotations", "log"))


def test_two_passes_and_the_published_layout(endpoint, make, args, capsys):
    records, args.price = make(3), [2.0, 10.0]
    rationales = {"image": [], "reasoning": ["Three and five make eight."]}
    records[1] |= {"reference": rationales, "answer": "eight", "choices": None}
    endpoint.script = lambda request, attempt: json.dumps(
        {k: [s.replace("answer is 8", "answer is 8, or eight") for s in v] for k, v in [CHAIN, REFINED][attempt % 2].items()}
    )
    annotate.annotate(records, args)
    rows, lines, log = results(args)
    assert [row["question_id"] for row in rows] == ["q0", "q1", "q2"] and sorted(map(str, rows)) == sorted(map(str, lines))
    row = rows[0]
    published = {"split", "image_id", "question_id", "question", "choices", "correct_choice_idx", "direct_answers"}
    assert set(row) == published | {"keys", "keys_filtered", "image"}
    assert (row["split"], row["image_id"], row["image"]) == ("train", 42, records[0]["image"])
    assert (row["question"], row["choices"], row["correct_choice_idx"]) == ("What is 0 {here}?", ["7", "8"], 1)
    assert row["direct_answers"] == ["8", "eight"] and rows[1]["correct_choice_idx"] is None and rows[1]["choices"] is None
    assert row["keys"]["Image_level"] == CHAIN["image"]
    assert row["keys"]["Reasoning_level"] == ["3 plus 5 is 8.", "So, the answer is 8, or eight."]  # stops added
    assert row["keys_filtered"] == {"Image_level": REFINED["image"], "Reasoning_level": ["So, the answer is 8, or eight."]}
    first, second = endpoint.asked("What is 1 {here}?")
    assert (first["model"], first["path"], first["key"]) == ("some-model", "/v1/chat/completions", f"Bearer {KEY}")
    assert annotate.ANNOTATE["task"] in first["text"] and annotate.REFINE["task"] in second["text"]
    assert "Answer: eight\n" in first["text"] and "Rationale: Three and five make eight." in first["text"]
    assert not any("Rationale" in r["text"] or "The key" in r["text"] for r in endpoint.asked("What is 0 {here}?"))
    assert "The sky is blue." in second["text"] and "Rationale:" not in second["text"] and "The sky is blue." not in first["text"]
    for request in (first, second):
        prefix, data = request["url"].split(",")
        assert prefix == "data:image/png;base64" and base64.b64decode(data) == Path(records[0]["image"]).read_bytes()
    assert log == [{"requests": 6, "prompt_tokens": 600, "completion_tokens": 60, "cost": 0.0018}]
    printed = capsys.readouterr().out
    assert "3 of 3 chains written" in printed and "requests 6, prompt_tokens 600, completion_tokens 60, cost 0.0018" in printed


def test_retries(endpoint, make, args):
    """429 waits as long as Retry-After says, other troubles have growing pauses; then the chain is there."""
    troubles = {
        "What is 0 {here}?": [(429, {"Retry-After": "0.6"})],
        "What is 1 {here}?": [(500, {}), (503, {}), (500, {}), (500, {})],
        "What is 2 {here}?": [(408, {}), (409, {})],
    }

    def script(request, attempt):
        trouble = troubles.get(request["question"], [])
        return trouble[attempt] if attempt < len(trouble) else json.dumps(CHAIN)

    endpoint.script = script
    annotate.annotate(make(4), args)
    rows, _, log = results(args)
    assert len(rows) == 4 and log[0]["requests"] == len(endpoint.requests) == 8 + 1 + 4 + 2 and "cost" not in log[0]
    assert log[0]["prompt_tokens"] == 800
    a, b = (r["time"] for r in endpoint.asked("What is 0 {here}?")[:2])
    assert b - a >= 0.6
    times = [r["time"] for r in endpoint.asked("What is 1 {here}?")[:5]]
    pauses = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert all(pause >= 0.75 * 0.02 * 2**i for i, pause in enumerate(pauses))


def test_dropped_connections_and_timeouts_are_retried(endpoint, make, args, monkeypatch):
    monkeypatch.setattr(annotate, "TIMEOUT", 0.3)

    def script(request, attempt):
        if attempt == 0:
            time.sleep(0.6)  # the client has gone by then
        if attempt == 1:
            raise ConnectionError  # no answer at all
        return json.dumps(CHAIN)

    endpoint.script = script
    annotate.annotate(make(1), args)
    rows, _, log = results(args)
    assert len(rows) == 1 and log[0]["requests"] == 4 and log[0]["prompt_tokens"] == 200


def test_one_repair_step(endpoint, make, args):
    good = json.dumps(CHAIN)
    scripts = {
        "What is 0 {here}?": [good[:40], good, good],
        "What is 1 {here}?": [good, good[:-5], "```json\n" + good + "\n```"],
        "What is 2 {here}?": [good[:40], good[:50], good],
        "What is 3 {here}?": [json.dumps(CHAIN | {"reasoning": ["The answer is 18."]}), good, good],
    }
    endpoint.script = lambda request, attempt: scripts[request["question"]][attempt]
    annotate.annotate(make(4), args)
    rows, _, log = results(args)
    assert [row["question_id"] for row in rows] == ["q0", "q1", "q3"] and log[0]["left out: no valid JSON"] == 1
    assert [len(endpoint.asked(q)) for q in scripts] == [3, 3, 2, 3]
    user, answer, repair = endpoint.asked("What is 0 {here}?")[1]["messages"]
    assert user == endpoint.asked("What is 0 {here}?")[0]["messages"][0]
    assert answer == {"role": "assistant", "content": good[:40]} and "Unterminated string" in repair["content"]
    assert "no reasoning sentence names the answer: '8'" in endpoint.asked("What is 3 {here}?")[1]["messages"][2]["content"]


def test_refusals_are_counted_and_asked_for_again(endpoint, make, args, capsys):
    message = {"role": "assistant", "content": None, "refusal": "I won't."}
    refusals = [
        "I\u2019m sorry, but I can\u2019t help with identifying people.",
        {"index": 0, "finish_reason": "stop", "message": message},
        {"index": 0, "finish_reason": "content_filter", "message": message | {"content": "{", "refusal": None}},
        "I cannot do that.",
    ]
    questions = [f"What is {i} {{here}}?" for i in range(5)]
    endpoint.script = lambda r, attempt: (refusals + [json.dumps(CHAIN)])[questions.index(r["question"])]
    annotate.annotate(make(5), args)
    rows, _, log = results(args)
    assert [row["question_id"] for row in rows] == ["q4"] and log[0]["left out: refusal"] == 4 and log[0]["requests"] == 6
    printed = capsys.readouterr().out
    assert "q2 left out: refusal" in printed and "1 of 5 chains written" in printed and "left out: refusal 4" in printed
    endpoint.requests.clear()
    endpoint.script = lambda request, attempt: json.dumps(CHAIN)
    annotate.annotate(make(5), args)
    assert len(results(args)[0]) == 5 and len(endpoint.requests) == 8 and not endpoint.asked(questions[4])


@pytest.mark.parametrize("cut", [False, True])
def test_a_killed_run_resumes(endpoint, make, args, cut):
    """Nothing that is finished is asked for again, whether or not the last line was cut short."""
    endpoint.delay, args.concurrency, records = 0.03, 2, make(12)
    process = multiprocessing.get_context("fork").Process(target=annotate.annotate, args=(records, args))
    process.start()
    path = Path(args.out) / "annotations.jsonl"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (not path.exists() or len(common.read_jsonl(path)) < 4):
        time.sleep(0.01)
    process.kill()
    process.join()
    finished = {row["question_id"] for row in common.read_jsonl(path)}
    assert 4 <= len(finished) < 12 and not path.with_name("train_mmb.json").exists()
    if cut:
        with open(path, "a") as file:
            file.write('{"question_id": "q11", "questi')
    time.sleep(0.1)
    endpoint.requests.clear()
    args.concurrency, args.limit = 8, 14  # neither changes what the run is
    annotate.annotate(make(14), args)
    asked = {r["question"] for r in endpoint.requests}
    assert asked == {f"What is {i} {{here}}?" for i in range(14) if f"q{i}" not in finished}
    assert [row["question_id"] for row in results(args)[0]] == [f"q{i}" for i in range(14)]
    assert len(endpoint.requests) == 2 * (14 - len(finished))
    annotate.annotate(make(14), args)
    assert len(endpoint.requests) == 2 * (14 - len(finished)) and len(results(args)[1]) == 14
    args.model = "another-model"
    with pytest.raises(SystemExit):
        annotate.annotate(make(14), args)


@pytest.mark.parametrize("limit", [1, 3])
def test_concurrency(endpoint, make, args, limit):
    endpoint.delay, args.concurrency = 0.05, limit
    annotate.annotate(make(6), args)
    assert endpoint.peak == limit and len(results(args)[0]) == 6


def test_the_key_is_in_no_file_and_no_message(endpoint, make, args, capfd, monkeypatch):
    endpoint.script = lambda request, attempt: (400, {}) if "0" in request["question"] else json.dumps(CHAIN)
    annotate.annotate(make(3), args)
    rows, _, log = results(args)
    assert len(rows) == 2 and log[0]["left out: BadRequestError"] == 1
    endpoint.script = lambda request, attempt: (401, {})  # the message holds the key
    with pytest.raises(SystemExit) as stopped:
        annotate.annotate(make(3), args)
    printed = "".join(capfd.readouterr())
    assert stopped.value.code == 2 and "gave up: Error code: 401 - " in printed and "Bearer ..." in printed and KEY not in printed
    files = [path for path in Path(args.out).rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names == {"run.json", "train_mmb.json", "annotations.jsonl", "log.jsonl"}
    assert not any(KEY in path.read_text() or KEY in str(path) for path in files)
    assert len(results(args)[0]) == 2


def test_an_endpoint_that_fails_again_and_again_ends_the_run(endpoint, make, args, capfd):
    args.concurrency = 1
    endpoint.script = lambda request, attempt: b"<html>not this</html>"
    with pytest.raises(SystemExit):
        annotate.annotate(make(30), args)
    assert len(endpoint.requests) == annotate.STOP_AFTER and "gave up" in capfd.readouterr().err
    assert results(args)[0] == []
    endpoint.requests.clear()
    endpoint.script = lambda request, attempt: (400, {}) if request["question"] in bad else json.dumps(CHAIN)
    bad = {f"What is {i} {{here}}?" for i in range(20) if i % 2}  # never in a row
    annotate.annotate(make(20), args)
    assert len(results(args)[0]) == 10 and results(args)[2][-1]["left out: BadRequestError"] == 10


def test_usage_errors(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for url, key in ((None, None), ("localhost:8000", "two words"), ("http://", "k\u00e9y"), ("", "key\n")):
        for name, value in (("OPENAI_BASE_URL", url), ("OPENAI_API_KEY", key)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stopped:
            annotate.main(["--concurrency", "0", "--price", "1", "-1", "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and (not key or key not in error)
        assert all(text in error for text in ("one process", "OPENAI_BASE_URL", "OPENAI_API_KEY", "--concurrency", "--price"))
    assert not (tmp_path / "out").exists()


def test_unusable_records(endpoint, make, args, capsys):
    records = make(8)
    records[2]["answer"] = None
    annotate.annotate(records + [records[0]], args)  # an id that comes twice is asked for once
    assert len(results(args)[0]) == 7 and len(endpoint.requests) == 14 and "no answer (q2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no valid JSON"),
        ("Here it is: " + json.dumps(CHAIN), "no valid JSON"),
        (json.dumps([CHAIN]), "not an object"),
        (json.dumps(CHAIN | {"more": []}), "not an object"),
        (json.dumps({"image": CHAIN["image"]}), "not an object"),
        (json.dumps(CHAIN | {"image": "The left digit is 3."}), "image is not"),
        (json.dumps(CHAIN | {"image": []}), "image is not"),
        (json.dumps(CHAIN | {"reasoning": ["So, the answer is 8.", " . "]}), "reasoning is not"),
        (json.dumps(CHAIN | {"reasoning": ["So, the answer is 8.", 8]}), "reasoning is not"),
        (json.dumps(CHAIN | {"image": ["8."], "reasoning": ["So, the answer is 18."]}), "no reasoning sentence"),
        ("[" * 100_000, "no valid JSON"),
    ],
)
def test_strict_parsing(text, reason):
    with pytest.raises(ValueError) as error:
        annotate.parse_chain(text, "8")
    assert error.value.args[0].startswith(reason)


def test_parsing():
    text = json.dumps({"image": ['A  sign\u2028says "Stop!"'], "reasoning": ["It is a STOP  sign (red)", "Is it?"]})
    expected = {"image": ['A sign says "Stop!"'], "reasoning": ["It is a STOP sign (red).", "Is it?"]}
    assert annotate.parse_chain(f"```\n{text}\n```\n", "Stop sign.") == expected
    assert annotate.parse_chain(json.dumps({"image": ["a"], "reasoning": ["So, the answer is <"]}), "<")
