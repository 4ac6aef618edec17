"""How fast are the estimators? Run by hand: python tests/bench_estimators.py [--help]"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import estimate

import numpy as np
import torch
from benchmark import machine, report


def token_statistics(args) -> None:
    """Log-probability and entropy of every token, from the last hidden states."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, generator=generator)
    head = torch.nn.Linear(args.hidden, args.vocab, bias=False)
    targets = torch.randint(args.vocab, (args.tokens,), generator=generator)

    def bare():
        for rows in hidden.split(common.HeadStatistics.ROWS):
            head(rows)

    def naive():
        logp = head(hidden).log_softmax(-1)
        return logp.gather(-1, targets[:, None]), -(logp.exp() * logp).sum(-1)

    variants = {
        "bare matrix product": bare,
        "ours": lambda: common.HeadStatistics.apply(hidden, head.weight, targets),
        "naive": naive,
    }
    with torch.no_grad():
        report(f"token statistics, {args.tokens} tokens x {args.vocab:,}", variants, "bare matrix product", args.runs)
    hidden, head = hidden[: args.tokens // 4].requires_grad_(), head.requires_grad_(False)
    targets = targets[: args.tokens // 4]

    def bare_gradient():
        for rows in hidden.detach().split(common.HeadStatistics.ROWS):
            head(rows)  # forward
            head(rows) @ head.weight  # made again, and back

    def plain():
        logp = head(hidden).log_softmax(-1)
        (logp.gather(-1, targets[:, None]).sum() - (logp.exp() * logp).sum()).backward()

    variants = {"bare matrix products": bare_gradient, "plain": plain}
    variants["ours"] = lambda: sum(x.sum() for x in common.HeadStatistics.apply(hidden, head.weight, targets)).backward()
    report(f"... with gradient, {len(hidden)} tokens", variants, "bare matrix products", args.runs)


def generation(args) -> None:
    """Sampling alone, and with the statistics of one more pass over what was sampled."""
    processor = estimate.build_digits_processor()
    torch.manual_seed(0)
    model = estimate.build_digits_model(processor, hidden_size=args.width, layers=args.layers)
    model.resize_token_embeddings(args.generation_vocab)
    vlm = common.make_vlm(model, processor)
    vlm.end_tokens = [args.generation_vocab - 1]  # hardly ever sampled: all responses have the full length
    pixels = [common.draw_digits(np.random.default_rng(i), "base")[0] for i in range(args.batch)]
    prompts = common.collate(vlm, [{"image": common.to_image(x), "question": "?"} for x in pixels])

    @torch.no_grad()
    def plain():
        return common.generate(vlm, prompts, 1.0, args.new_tokens, 0)

    @torch.no_grad()
    def measured():
        with common.images_encoded_once(vlm):
            return common.response_statistics(vlm, common.add_responses(vlm, prompts, plain()))

    size = f"{args.layers} layers of {args.width}, vocabulary {args.generation_vocab:,}"
    title = f"generation, batch {args.batch}, {args.new_tokens} tokens, {size}"
    report(title, {"plain generate": plain, "with statistics": measured}, "plain generate", args.runs, memory=False)


def build_cross_encoder(folder: Path) -> str:
    """A cross-encoder of MiniLM's size with random weights, with the tokenizer of the packaged sentence encoder."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = common.sentence_encoder().model.tokenizer
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def relevance(args) -> None:
    """TokenSAR's leave-one-token-out similarities."""
    digits = [(f, a, b) for f in common.FAMILIES for a in range(10) for b in range(10)]
    chains = [
        (common.FAMILIES[f], s) for f, a, b in digits for s in common.reference_chain({"reference": common.digit_chain(f, a, b)})
    ]
    texts = list(dict.fromkeys(chains))
    groups = []
    for question, sentence in texts[:: max(1, len(texts) // args.sentences)][: args.sentences]:
        words = [m.span() for m in re.finditer(r"\s?\S+", sentence)]
        groups.append((question, sentence, words))
    with tempfile.TemporaryDirectory() as folder:
        relevance_by(common.Similarity(), "sentence embeddings", groups, args)
        relevance_by(common.Similarity(build_cross_encoder(Path(folder))), "cross-encoder", groups, args)


def texts_of(question: str, sentence: str, words: list[tuple[int, int]]) -> list[str]:
    """What is compared: question and sentence, whole, then without each word."""
    return [f"{question} {sentence}", *(f"{question} {sentence[:a]}{sentence[b:]}" for a, b in words)]


def relevance_by(similarity: common.Similarity, kind: str, asked: list[tuple], args) -> None:
    groups = [texts_of(*one) for one in asked]
    pairs = [(g[0], t) for g in groups for t in g[1:]]

    def ours():
        similarity.scores.clear()
        common.token_relevance(asked, similarity)

    def bare():
        if similarity.cross_encoder:
            similarity.cross_encoder.predict(sorted(set(pairs), key=lambda p: len(p[0]) + len(p[1])), batch_size=64)
        else:
            similarity.encoder(sorted({t for p in pairs for t in p}, key=len))

    def one_by_one():
        for group in groups:
            for i in range(1, len(group), 10):
                if similarity.cross_encoder:
                    similarity.cross_encoder.predict([(group[0], t) for t in group[i : i + 10]])
                else:
                    similarity.encoder([group[0], *group[i : i + 10]])

    variants = {"bare encoder": bare, "ours": ours, "ours, seen before": lambda: common.token_relevance(asked, similarity)}
    variants["one call a sentence"] = one_by_one
    title = f"TokenSAR by {kind}, {len(groups)} sentences, {len(pairs)} pairs"
    report(title, variants, "bare encoder", args.runs, memory=False, per=len(groups), unit="sentences")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["token_statistics", "generation", "relevance"], help="what to measure")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=152_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--generation-vocab", type=int, default=32_000)
    parser.add_argument("--sentences", type=int, default=266)
    args = parser.parse_args()
    print(machine())
    for part in args.parts:
        {"token_statistics": token_statistics, "generation": generation, "relevance": relevance}[part](args)


if __name__ == "__main__":
    main()
