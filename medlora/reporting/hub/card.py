"""The model card of an export: README.md with metadata that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from medlora.artifacts.adapter_origin import describe_origin, identify_adapter, read_origin
from medlora.artifacts.bases import find_base
from medlora.config.run import RunConfig
from medlora.curriculum.chains import Link
from medlora.data.card import DataCard, describe_overlap, read_card
from medlora.evaluation.ledger import REPORT
from medlora.reporting.results.story import sum_counts
from medlora.reporting.templates import fill_text
from medlora.runs.environment import get_versions
from medlora.runs.files import read_mapping, write_bytes
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import CARD, is_card, read_manifest


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from; the rest is read from the run."""

    run: RunFolder
    config: RunConfig
    stage: str
    chain: Sequence[Link]
    kind: str
    notes: Sequence[str] = ()
    """What was said when the export was written."""
    repository: str | None = None
    """Where it is going to be on the hub."""

    @property
    def name(self) -> str:
        """What the model is called."""
        return (self.repository or f"{self.config.name}-{self.stage}").rpartition("/")[2]

    @property
    def base(self) -> str:
        """The base by hub id, or by its folder's name: a path says nothing elsewhere."""
        model = self.config.base.model
        return Path(model).name if Path(model).expanduser().is_dir() else model


def build_card(facts: CardFacts) -> str:
    """The text of README.md: metadata, then what a user of the model must know."""
    report = read_mapping(facts.run.evaluation / REPORT) or {}
    rows = [row for row in report.get("stages", []) if row.get("stage") == facts.stage]
    data: Mapping[str, Any] = read_card(facts.run.data) or {}
    parts = [
        f"# {facts.name}",
        *_describe_model(facts),
        *_describe_training(facts),
        *_describe_data(data),
        *_describe_accuracy(facts, rows, report),
        *_describe_use(),
        *_describe_origin(facts),
    ]
    return f"---\n{_write_metadata(facts, rows)}---\n\n" + "\n\n".join(parts) + "\n"


def write_phase_cards(
    run: RunFolder, config: RunConfig, stages: Mapping[str, Sequence[Link]], only_known: bool = False
) -> list[Path]:
    """Write the cards of finished phases with what the run knows by now; returns the cards that were written.

    A README.md of the user's own stays as it is, and so does anything of that name that is no file, such as a pipe.
    With `only_known`, only cards that are there are written anew.
    """
    written = []
    for phase in config.phases:
        card = run.phase(phase.name).adapter / CARD
        is_free = not (card.exists() or card.is_symlink())
        if phase.name in stages and card.parent.is_dir() and (is_card(card) or (is_free and not only_known)):
            facts = CardFacts(run, config, phase.name, stages[phase.name], "phase")
            write_bytes(card, build_card(facts).encode())
            written.append(card)
    return written


def _write_metadata(facts: CardFacts, rows: Sequence[Mapping[str, Any]]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="multiple-choice",
            task_name="Multiple choice",
            dataset_type=row["test"],
            dataset_name=row["test"],
            metric_type="accuracy",
            metric_name="accuracy",
            metric_value=round(row["accuracy"], 4),
        )
        for row in rows
    ]
    is_on_hub = find_base(facts.config.base) == facts.config.base.model and facts.base == facts.config.base.model
    known = is_on_hub and facts.base != "miniature"
    data = ModelCardData(
        base_model=facts.base if known else None,
        base_model_relation={"merged": "finetune"}.get(facts.kind, "adapter") if known else None,
        language=["ko", "en"],
        library_name="transformers" if facts.kind == "merged" else "peft",
        pipeline_tag="text-generation",
        tags=["medical", "korean", "lora", "medlora"],
        metrics=["accuracy"] if results else None,
        model_name=facts.name,
        eval_results=results or None,
    )
    # The line by which medlora knows its own cards, and an export what it stands on.
    ours = json.dumps(_describe_own(facts), ensure_ascii=False, sort_keys=True)
    return f"medlora: {ours}\n{data.to_yaml()}\n"


def _describe_own(facts: CardFacts) -> dict[str, Any]:
    if facts.kind == "phase" and (known := describe_origin(_list_phases(facts)[facts.stage])):
        return known
    origin = read_origin(Path(facts.chain[-1].folder))
    about = {"model": facts.base} | ({} if origin is None else origin.base)
    if about["model"] != "miniature":
        about["model"] = facts.base
    return {
        "run": facts.config.name,
        "phase": facts.stage,
        "chain": [facts.stage],
        "base": about,
        "below": [],
        "export": facts.kind,
    }


def _describe_model(facts: CardFacts) -> Iterator[str]:
    yield f"Stage `{facts.stage}` of the run `{facts.config.name}`, trained with medlora."
    base = facts.config.base
    lines = [f"- Base: `{facts.base}`" + (f", revision `{base.revision}`" if base.revision else "")]
    if base.quantization != "none":
        once = ", its weights dequantized once" if base.dequantize else ""
        lines.append(f"- The base was loaded as {base.quantization} for training and scoring{once}.")
    if facts.kind != "merged":
        lines.append(f"- It needs the base `{facts.base}`; on another model its outputs mean nothing.")
    if facts.kind == "phase" and (below := facts.chain[:-1]):
        shown = ", ".join(f"`{link.name}`" for link in below)
        lines.append(
            f"- **Not for use alone.** It was trained on top of {shown}, which must be active under it, in this order."
        )
    lines += [f"- Note: {note}." for note in facts.notes]
    yield "\n".join(lines)
    quoted = {"base": facts.base, "name": facts.repository or facts.name}
    texts = {key: json.dumps(text, ensure_ascii=False) for key, text in quoted.items()}
    yield fill_text(f"{facts.kind}.md", **texts).strip()


def _describe_training(facts: CardFacts) -> Iterator[str]:
    yield "## Training"
    trained = _list_phases(facts)
    lines = ["| phase | chain | examples | steps | learning rate | rank | alpha |", "|---|---|---|---|---|---|---|"]
    for name, manifest in trained.items():
        phase = facts.config.phase(name)
        lora = phase.lora or facts.config.lora
        kinds = [text for text, is_on in (("rsLoRA", lora.rslora), ("DoRA", lora.dora)) if is_on]
        steps = sum(int(part.get("steps", 0)) for part in manifest.get("segments", []) if isinstance(part, dict))
        cells = [
            f"`{name}`",
            phase.chain,
            f"{examples:,}" if (examples := sum_counts(manifest.get("counts"), "examples")) else "",
            str(steps or ""),
            f"{phase.learning_rate:g}",
            " ".join([str(lora.r), *kinds]),
            f"{lora.alpha:g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    yield "\n".join(lines)
    active = " + ".join(f"`{link.name}`" for link in facts.chain)
    yield f"Adapters in the stage: {active}. Seed {facts.config.seed}."
    if facts.config.base.extra_tokens:
        yield "Words were added to the vocabulary. Use the tokenizer that comes with this adapter or model."


def _list_phases(facts: CardFacts) -> dict[str, dict[str, Any]]:
    """The phases up to the stage, each with its manifest: also those whose adapter a later one continued."""
    found: dict[str, dict[str, Any]] = {}
    for phase in facts.config.phases:
        found[phase.name] = dict(read_manifest(facts.run.phase(phase.name).root) or {})
        if phase.name == facts.stage:
            break
    return found


def _describe_data(data: Mapping[str, Any]) -> Iterator[str]:
    yield "## Data"
    if not data:
        yield "The run has no data card."
        return
    lines = ["| source | licence | rows | records used |", "|---|---|---|---|"]
    for source in data["training"].values():
        name = _name_source(source["source"])
        lines.append(f"| {name} | {source['licence'] or 'not stated'} | {source['rows']:,} | {source['records']:,} |")
    yield "\n".join(lines)
    overlap = data["overlap"]
    found = (
        f"{overlap['records']} training records held questions of the tests or of dev (`data.overlap: {overlap['mode']}`)."
        if overlap.get("records")
        else "No training record held a question of the tests or of dev, as far as medlora's comparison of texts finds them."
    )
    yield " ".join([f"Overlap: {found}", *(f"{text}." for text in describe_overlap(cast(DataCard, data)))])
    if data["personal"]:
        places = ", ".join(f"{kind} {n}" for kind, n in data["personal"].items())
        yield f"Places in the training data that look like personal data: {places}."


def _name_source(source: str) -> str:
    """A source as others may see it: a file's name without the folders of this machine."""
    is_remote = "://" in source or source.startswith(("hf:", "miniature:"))
    names = [source] if is_remote else [Path(part).name for part in source.split("|")]
    return " and ".join(f"`{name}`" for name in names)


def _describe_accuracy(facts: CardFacts, rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> Iterator[str]:
    yield "## Accuracy"
    if not rows:
        yield "This stage was not scored in its run."
        return
    bases = {row["test"]: row for row in report["stages"] if row.get("stage") == "base"}
    lines = ["| test | n | accuracy | 95 % interval | base alone |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["interval"]
        base = f"{bases[row['test']]['accuracy']:.1%}" if row["test"] in bases else ""
        lines.append(f"| {row['test']} | {row['n']:,} | {row['accuracy']:.1%} | {low:.1%} to {high:.1%} | {base} |")
    yield "\n".join(lines)
    evaluation = facts.config.evaluation
    how = f" Scoring `{evaluation.scoring}`, prompt style `{evaluation.style}`." if evaluation else ""
    yield f"Multiple-choice questions with one right option; intervals are Wilson's.{how}"


def _describe_use() -> Iterator[str]:
    yield "## Intended use and limits"
    yield (
        "The model is meant for research on Korean medical language, such as multiple-choice exams.\n"
        "It is no medical device. Nobody has checked it for diagnosis, treatment or advice to patients.\n"
        "Its answers can be wrong and sound certain. The accuracy above holds for those tests and that prompt alone.\n"
        "The licences of the base and of every source bind whoever uses or passes on this model."
    )


def _describe_origin(facts: CardFacts) -> Iterator[str]:
    yield "## Versions and hashes"
    about = read_mapping(facts.run.about) or {}
    lines = [f"- trained with: {_join(about.get('versions'))}"]
    lines += [f"- exported with: {_join(get_versions())}"] if facts.kind != "phase" else []
    if about.get("git_commit"):
        lines.append(f"- commit: `{about['git_commit']}`")
    origin = read_origin(Path(facts.chain[-1].folder))
    if origin is not None:
        known = [
            f"{key} `{origin.base[key]}`" for key in ("files", "weights", "seed") if origin.base.get(key) is not None
        ]
        lines.append(f"- base: {', '.join(known)}")
    lines += [f"- adapter `{link.name}`: `{identify_adapter(Path(link.folder))}`" for link in facts.chain]
    yield "\n".join(lines)


def _join(versions: object) -> str:
    if not isinstance(versions, Mapping):
        return "unknown versions"
    return ", ".join(f"{name} {version}" for name, version in versions.items())
