"""What several tests share: a policy whose every probability is set, a model that says what a test wants, a refusal in a line."""

import re
from collections import defaultdict
from types import SimpleNamespace

import common
import estimate

import numpy as np
import pytest
import torch
from torch import nn


def processor():
    """The digits world's own; its tokens are words: 'The', ' left', ' digit', ' is', ' 3', ',', ' with', ' confidence', ..."""
    return estimate.build_digits_processor()


def record(left, right, family="sum", reference=None, grey=0.0):
    """A question whose prompt has the same length and last token as any other's."""
    chain = common.digit_chain(family, left, right) | (reference or {})
    answer = chain["reasoning"][-1].removeprefix("So, the answer is ").rstrip(".") if chain["reasoning"] else ""
    pixels = common.to_image(np.full((16, 16), grey))
    return {"id": "digits-0", "image": pixels, "question": "What?", "choices": None, "answer": answer, "reference": chain}


def tokens(processor, text, end=False):
    """Token ids of a text, with the end-of-sequence token where asked for."""
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"] + [processor.tokenizer.eos_token_id] * end


class OneHot(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.vocabulary, self.dtype_of = head.in_features, [head]

    def forward(self, input_ids, **_):
        hidden = nn.functional.one_hot(input_ids, self.vocabulary).to(self.dtype_of[0].weight.dtype)
        return SimpleNamespace(last_hidden_state=hidden)


class Bigram(nn.Module):
    """A language model whose next token depends on the last one alone, behind the interface of a transformers model.

    Its hidden state is the one-hot vector of the last token, so column i of the head holds the logits after token i."""

    OFF = -30.0  # the logit of what never follows

    def __init__(self, processor, texts, end=False):
        """texts: {response: its probability}; what follows no token of them follows with equal probability."""
        super().__init__()
        size = len(processor.tokenizer)
        self.head = nn.Linear(size, size, bias=False)
        self.model = OneHot(self.head)
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)
        self.tower = nn.Identity()
        start = common.collate(self.vlm(processor), [record(0, 0)]).inputs["input_ids"][0, -1].item()
        counts = defaultdict(float)
        for text, probability in texts.items():
            ids = [start, *tokens(processor, text, end)]
            for pair in zip(ids, ids[1:], strict=False):
                counts[pair] += probability
        with torch.no_grad():
            self.head.weight.zero_()
            for before in {before for before, _ in counts}:
                self.head.weight[:, before] = self.OFF
            for (before, after), count in counts.items():
                total = sum(n for (b, _), n in counts.items() if b == before)
                self.head.weight[after, before] = float(np.log(count / total))

    dtype = property(lambda self: self.head.weight.dtype)
    device = property(lambda self: self.head.weight.device)

    def vlm(self, processor):
        ends = [processor.tokenizer.eos_token_id]
        return common.VLM(self, self, self.head, processor, processor.tokenizer, True, ends, re.compile("(?!)"))

    def get_encoder(self, modality):
        return self.tower

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.head(self.model(input_ids).last_hidden_state))

    def column(self, processor, before):
        """The logits after the token `before`, a copy."""
        return self.head.weight[:, tokens(processor, before)[0]].detach().clone()


def says(monkeypatch, ids):
    """Let `generate` return these responses (lists of token ids), whatever it is asked."""
    left = list(ids)
    monkeypatch.setattr(common, "generate", lambda vlm, prompts, *_: [left.pop(0) for _ in prompts.inputs["input_ids"]])


def code_and_line(capsys, main, *flags) -> str:
    """The one line with which a script refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([str(flag) for flag in flags])
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert error.value.code == 2 and len(lines) == 1
    return lines[0]
