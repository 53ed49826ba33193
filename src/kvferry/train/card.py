"""The card of an aligner folder: what it maps, what it was fitted under, and how well it does on held-out data."""

import platform

import torch

from kvferry.train.fit import CodecScore, Fitted


def card(fitted: Fitted, sender: str, receiver: str, command: str) -> str:
    """Markdown for the folder's README.md."""
    contract = fitted.aligner.contract
    n_parameters = sum(parameter.numel() for parameter in fitted.aligner.parameters())
    facts = {
        "sender": f"{sender} (model {contract.sender.model[:16]}, tokenizer {contract.sender.tokenizer[:16]})",
        "receiver": f"{receiver} (model {contract.receiver.model[:16]}, tokenizer {contract.receiver.tokenizer[:16]})",
        "grid": f"{contract.grid}, {contract.stride:.4f} receiver tokens per sender token",
        "coded_with": "; ".join(contract.coded_with),
        "method": f"{fitted.aligner.name}: ridge (penalty {fitted.penalty:g}, {fitted.recipe.n_texts} texts), then "
        f"{fitted.recipe.steps} steps on the receiver's answer loss",
        "data": f"{fitted.source}, seed {fitted.recipe.seed}; penalty chosen on dev, scores below from test",
        "size": f"{n_parameters:,} parameters, {4 * n_parameters / 1e6:.2f} MB",
        "time": f"{fitted.seconds:.0f} s, {torch.get_num_threads()} threads of {platform.machine()}",
    }
    lines = [f"# {sender} to {receiver}", "", *(f"- **{key}**: {value}" for key, value in facts.items()), ""]
    lines += ["Answers right are those of which every token was the likeliest, given the tokens before.", ""]
    lines += ["| codec | ridge: nats per token | ridge: answers right | nats per token | answers right |"]
    lines += ["|---|---:|---:|---:|---:|", *_rows(fitted)]
    lines += ["", f"Made by `{command}`.", ""]
    return "\n".join(lines)


def _rows(fitted: Fitted) -> list[str]:
    rows = [_row(before, after) for before, after in zip(fitted.ridge_scores, fitted.scores, strict=True)]
    controls = [
        f"| control: {row.codec} | | | {row.loss:.3f} | {row.accuracy:.3f} |" for row in fitted.controls
    ]
    return rows + controls


def _row(before: CodecScore, after: CodecScore) -> str:
    numbers = f"{before.loss:.3f} | {before.accuracy:.3f} | {after.loss:.3f} | {after.accuracy:.3f}"
    return f"| {after.codec} | {numbers} |"
