"""An inference server samples in the place of `common.generate`, for any script; everything is still measured here, in one pass.

    python estimate.py --server http://localhost:8000 --data aokvqa --data-dir aokvqa/
    python ppo.py --server http://localhost:8000 --ckpt warmup/

The flags below, and all of the script's own. The server is any that speaks OpenAI's protocol (a key: OPENAI_API_KEY); adapters need
vLLM, started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. Its log-probabilities only tell whether it samples from the
model that is measured: in the first batch, the last responses of every batch, and every update of ppo.py, whose log has `mismatch`,
the mean |log p (server) - log p (ours)| a token, and `mismatch_clipfrac`, the share of tokens that it alone would clip.

Choices
 1. A batch of the script is asked at once, --concurrency requests at a time: larger batches keep the server busy.
 2. ppo.py sends its adapter before every update under a new name, for which the server has cached nothing, and takes the last one
    away. Full weights cannot be sent.
 3. Seeds go by the script's seed, the question, and how often the batch held it before. Neighbours that are one question are one
    request, which asks for all of its samples.

    python tests/server.py cache/world3/digits-seed0-noise1/model served/    # a copy, under the names of weights that vLLM knows
"""

import argparse
import base64
import contextlib
import functools
import importlib
import io
import itertools
import math
import multiprocessing
import os
import re
import shutil
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import estimate
import evaluate
import ppo

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from annotate import RETRIES
from openai import APIConnectionError, APIStatusError, AuthenticationError, BadRequestError, NotFoundError, OpenAI
from safetensors.torch import load_file, save_file

collate, rollout, train_update = common.collate, ppo.rollout, ppo.train_update  # as they are without a server


class Server:
    """The client of a server that knows a model, by the name that the scripts use, and takes adapters of it."""

    SHOWN = 4  # responses, so that one short one says little

    def __init__(self, url: str, path: str, concurrency=32, max_mismatch=0.1, name: str | None = None, patience=900.0):
        """path: the model, or the folder of an adapter of it, which is sent; name: what the server calls the model, if not so;
        patience: seconds to wait for an answer. What fails exits with code 2, in one line."""
        self.url, self.max_mismatch, self.said, self.checked = re.sub("//.*@", "//", url), max_mismatch, [], set()
        self.limit = max_mismatch  # of what is checked next
        common.usage_error(not re.match("https?://.", url) and f"--server {self.url} is no address such as http://localhost:8000")
        user = re.search("//(.*)@", url)
        key, self.answered = os.environ.get("OPENAI_API_KEY", "").strip(), False
        common.usage_error(not (key.isascii() and key.isprintable()) and "OPENAI_API_KEY holds what no header can hold")
        self.patience, self.secrets = patience, [key, *(user[1].split(":") if user else ())]
        self.pool = ThreadPool(concurrency)  # of daemons, for which a run that stops does not wait
        address = re.sub(r"(/v1)?/*$", "", url) + "/v1"
        with self.trying("is no address"):
            self.client = OpenAI(base_url=address, api_key=key or "none", max_retries=RETRIES, timeout=patience)
        adapter = Path(path, "adapter_config.json")
        self.base = name or (common.read_json(adapter)["base_model_name_or_path"] if adapter.exists() else str(path))
        self.adapter = None
        with self.trying("does not answer, or not as OpenAI's do"):
            known = [model.id for model in self.client.with_options(max_retries=0, timeout=20).models.list().data]
        self.answered = True
        same = [model for model in known if model == self.base or os.path.realpath(model) == os.path.realpath(self.base)]
        problem = f"server {self.url} serves {', '.join(known) or 'nothing'} and no {self.base} (--served-model NAME)"
        common.usage_error(*[problem] * (not same))
        self.base = same[0]
        if adapter.exists():
            self.load_adapter(path)

    @contextlib.contextmanager
    def trying(self, trouble: str) -> Iterator[None]:
        """What fails inside ends the run with one line, without a key that the server quotes."""
        try:
            yield
        except Exception as error:  # the client raises many kinds
            passes = isinstance(error, (APIConnectionError, multiprocessing.TimeoutError))
            passes |= isinstance(error, APIStatusError) and (error.status_code == 429 or error.status_code >= 500)
            gone = isinstance(error, NotFoundError) and trouble == "fails" and self.adapter is not None  # with a server begun anew
            passes = self.answered and (passes or gone)
            reason = " ".join(f"{error} {error.__cause__ or ''}".split()) or f"no answer in {self.patience:g} s"
            trouble = "wants another key (OPENAI_API_KEY)" if isinstance(error, AuthenticationError) else trouble
            for secret in filter(None, self.secrets):
                reason = reason.replace(secret, "...")
            trouble = "fails; once it is back, the same command goes on from what is saved" if passes else trouble
            common.usage_error(f"server {self.url} {trouble} ({type(error).__name__}: {reason[:240]})")

    def load_adapter(self, folder: str | Path) -> None:
        """Sample from the adapter in a folder that the server can read."""
        before, self.adapter = self.adapter, f"policy-{os.urandom(6).hex()}"
        if PartialState().is_main_process:
            with self.trying("takes no adapter (vLLM: --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1)"):
                body = {"lora_name": self.adapter, "lora_path": os.path.abspath(folder)}
                load = functools.partial(self.client.post, "/load_lora_adapter", cast_to=str, body=body)
                try:
                    self.pool.apply_async(load).get(self.patience)
                except BadRequestError as error:  # asked again, for an answer that was lost
                    if "already been loaded" not in str(error):
                        raise
                finally:
                    self.unload(before)
        [self.adapter] = broadcast_object_list([self.adapter])

    def unload(self, adapter: str | None) -> None:
        """Take an adapter away, where the server still has it."""
        if adapter and PartialState().is_main_process:
            with contextlib.suppress(Exception):
                once = self.client.with_options(max_retries=0, timeout=5)
                once.post("/unload_lora_adapter", cast_to=str, body={"lora_name": adapter})

    def sample(self, vlm, records: list[dict], temperature: float, length: int, seed: int) -> list[tuple[list[int], torch.Tensor]]:
        """A response to each question: token ids as from `generate`, and what the server says of their log-probabilities (L,), NaN
        where it says nothing. Neighbours that are one question are one request."""
        empty = vlm.processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": ""}]}], tokenize=False)
        adapted = hasattr(vlm.model, "peft_config")
        settings = {"model": self.adapter if adapted else self.base, "temperature": temperature, "max_tokens": length}
        settings |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": True, "return_token_ids": True}
        settings |= {"stop_token_ids": vlm.end_tokens, "add_special_tokens": not empty.startswith(vlm.tokenizer.bos_token or "\0")}
        settings["logit_bias"] = dict.fromkeys(map(str, vlm.base.generation_config.suppress_tokens or ()), -100)

        def ask(record: dict, n: int, before: int) -> list[dict]:
            picture = io.BytesIO()  # of the pixels that are measured
            common.load_image(record["image"]).save(picture, "png", compress_level=1)
            url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
            text = vlm.special.sub(" ", common.prompt_text(record))
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
            body = settings | {"n": n, "seed": zlib.crc32(f"{seed} {record['id']}{f' {before}' * (before > 0)}".encode())}
            body["messages"] = [{"role": "user", "content": content}]
            return self.client.post("/chat/completions", cast_to=object, body=body)["choices"]

        drawn, answers, asked = [], [], Counter()
        for group in [list(group) for _, group in itertools.groupby(records, key=id)]:
            name = group[0]["id"]
            answers.append((group, self.pool.apply_async(ask, [group[0], len(group), asked[name]])))
            asked[name] += 1
        for group, answer in answers:
            with self.trying("fails"):
                for choice, _ in zip(answer.get(self.patience), group, strict=True):
                    ids, tokens = choice.get("token_ids"), (choice.get("logprobs") or {}).get("content") or []
                    if ids is None:
                        warnings.warn("the server gives no token ids: its texts are tokenised", stacklevel=1)
                        whole = choice["finish_reason"] == "stop"
                        [ids] = common.response_ids(vlm, [choice["message"]["content"] or ""], [whole])
                    elif not self.sound(vlm, ids, length):
                        raise ValueError("token ids that this model would not have sampled")
                    said = [token["logprob"] for token in tokens] if len(tokens) == len(ids) else [math.nan] * len(ids)
                    drawn.append((ids, torch.tensor(said)))
        return drawn

    @staticmethod
    def sound(vlm, ids: list, length: int) -> bool:
        """Whether `generate` could have given these ids: up to `length` of the vocabulary, none that is never sampled, as that of
        an image, and an end token at the end alone."""
        words, banned = vlm.head.weight.shape[0], vlm.base.generation_config.suppress_tokens or ()
        known = all(type(token) is int and 0 <= token < words and token not in banned for token in ids)
        return known and 0 < len(ids) <= length and not set(ids[:-1]) & set(vlm.end_tokens)

    def generate(self, vlm, prompts: common.Batch, temperature: float, length: int, seed: int) -> list[list[int]]:
        """As `common.generate`; what the server says of the log-probabilities is kept in `said`."""
        ids, said = map(list, zip(*self.sample(vlm, prompts.records, temperature, length, seed), strict=True))
        self.said += said
        return ids

    def generate_and_check(self, vlm, prompts: common.Batch, temperature: float, length: int, seed: int) -> list[list[int]]:
        """As `generate`. The first batch of a model, and the last SHOWN responses of every batch, which were asked last, show
        whether the server samples from it."""
        self.said.clear()
        ids = self.generate(vlm, prompts, temperature, length, seed)
        start = max(len(ids) - self.SHOWN, 0) if id(vlm) in self.checked else 0
        self.checked.add(id(vlm))
        with torch.no_grad():
            batch = collate(vlm, prompts.records[start:], ids[start:])
            apart = common.response_statistics(vlm, batch)[0][batch.mask].cpu() - torch.cat(self.said[start:])
        if start == 0:
            self.check(apart)
        self.check(apart[-sum(map(len, ids[-self.SHOWN :])) :])
        return ids

    def check(self, apart: torch.Tensor) -> float:
        """The mean difference of log-probabilities (tokens,), NaN without any; exits with code 2 where it is another model's: above
        --max-mismatch, or far above that of the first check, which is what the server's arithmetic differs by."""
        mismatch = apart.abs().nanmean().item()
        if math.isnan(mismatch):
            warnings.warn("the server gives no log-probabilities: whether it samples from this model is not known", stacklevel=1)
        problem = f"server {self.url} samples from another model: mismatch = {mismatch:.3g} nats a token, above {self.limit:.3g}"
        common.usage_error(*[problem] * (mismatch > self.limit))
        if self.limit == self.max_mismatch and mismatch < self.limit:
            self.limit = min(self.max_mismatch, max(0.005, 10 * mismatch))
        return mismatch


def connect(server: Server, script: ModuleType) -> None:
    """Let a script sample by the server from now on."""

    @functools.wraps(collate)
    def collate_and_note(vlm, records, responses=()):
        batch = collate(vlm, records, responses)
        batch.records = records
        return batch

    @functools.wraps(rollout)
    def rollout_and_check(models, reader, questions, args, *rest):
        server.said.clear()
        roll = rollout(models, reader, questions, args, *rest)
        apart = roll.logprob[roll.mask] - torch.cat(server.said)
        apart = torch.tensor(gather_object(apart.tolist()))  # of all processes
        clipped = apart[~apart.isnan()].expm1().abs() > args.clip_range
        stats.update(mismatch=server.check(apart), mismatch_clipfrac=clipped.float().mean().item())
        return roll

    @functools.wraps(train_update)
    def send_and_train(models, optimizers, reader, judge, questions, args, *rest):
        folder = Path(args.out) / "adapter"
        if PartialState().is_main_process:
            models.policy.model.save_pretrained(folder, selected_adapters=["default"])
        PartialState().wait_for_everyone()
        server.load_adapter(folder)
        return train_update(models, optimizers, reader, judge, questions, args, *rest) | stats

    stats: dict[str, float] = {}
    common.collate, common.generate = collate_and_note, server.generate_and_check
    if script is ppo:
        common.generate, ppo.rollout, ppo.train_update = server.generate, rollout_and_check, send_and_train


def model_path(script: ModuleType, given: argparse.Namespace) -> str:
    """The model, or the adapter, that a run will sample from; exits with code 2 where there is none, as the run itself does."""
    if script is evaluate:
        evaluate.read_setup(given)
        return given.ckpt
    if script is ppo:
        full = Path(given.ckpt).is_dir() and not Path(given.ckpt, "adapter_config.json").exists()
        common.usage_error(
            full and f"{given.ckpt} has no adapter, and full weights cannot be sent: warmup.py --lora-rank trains one"
        )
        common.read_run(given.ckpt)
        return given.ckpt
    if given.relevel:
        return common.read_run(given.relevel)["setup"]["model"]
    common.fill_defaults(given, estimate.FLAGS, "+".join(given.data))
    return given.model or estimate.digits_paths(given.cache, given.seed, given.noise_scale)["model"]


def copy_for_vllm(model: str | Path, folder: str | Path) -> None:
    """transformers saves `vision_tower.embeddings...`, published checkpoints have `vision_tower.vision_model.embeddings...`."""
    common.usage_error(*[f"no model in {model}"] * (not Path(model, "config.json").is_file()))
    shutil.copytree(model, folder, dirs_exist_ok=True)
    for path in Path(folder).glob("*.safetensors"):
        named = {name.replace("vision_tower.vision_model.", "vision_tower."): tensor for name, tensor in load_file(path).items()}
        weights = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in named.items()}
        save_file(weights, path, {"format": "pt"})


def main(argv: list[str] | None = None, name: str | None = None) -> None:
    """A script, by its name or that of the process, with a server."""
    name, form = name or Path(sys.argv[0]).stem, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.error = common.usage_error
    parser.add_argument("--server", metavar="URL", required=True, help="as http://localhost:8000")
    parser.add_argument("--served-model", metavar="NAME", help="what the server calls the model (default: as here)")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at a time")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds to wait for an answer, all tries together")
    parser.add_argument(
        "--max-mismatch", type=float, default=0.1, help="nats a token, beyond which it is another model (as is 10 x the first)"
    )
    args, flags = parser.parse_known_args(argv)
    if not (0 < args.concurrency <= 1024 and 0 < args.patience < 1e6 and args.max_mismatch > 0):
        common.usage_error("--concurrency must be 1 to 1024, --patience and --max-mismatch must be positive, --patience below 1e6")
    script = importlib.import_module(name)
    given = script.parse_args(flags)
    if script is estimate and (given.relevel or given.responses) and given.levels != "consistency":
        return script.main(flags)  # nothing is sampled
    given.server = True  # a setting: a run that went on without a server would be of two samplers
    with patch.object(script, "parse_args", lambda _: given), contextlib.ExitStack() as stack:
        if given.overwrite or not Path(given.out, "done").exists():
            path = model_path(script, given)
            PartialState(cpu=given.device == "cpu")  # as the script's Accelerator will
            server = Server(args.server, path, args.concurrency, args.max_mismatch, args.served_model, args.patience)
            stack.callback(lambda: server.unload(server.adapter))
            connect(server, script)
        script.main(flags)


if __name__ == "__main__":
    common.usage_error(len(sys.argv) != 3 and "needs the folder of a model and that of its copy")
    copy_for_vllm(*sys.argv[1:])
