"""From the files of a plan's measurements to the cells of a table, with error bars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blockdiffusion.data.loader import TokenRows
from blockdiffusion.errors import UserError
from blockdiffusion.files.records import read_json
from blockdiffusion.studies.reproduce.paper import PaperTable
from blockdiffusion.studies.reproduce.plan import Plan
from blockdiffusion.studies.reproduce.systems import find_system

ROWS_AT_A_TIME = 65_536


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A measured value.

    Attributes:
        value: in the paper's unit: a perplexity, tokens, a variance.
        stderr: of `value`; None where it is not known. Of a perplexity the larger of the errors of
            noise and data.
        is_bound: whether it is an upper bound.
        nats: log of a perplexity, and `nats_stderr` its error; None for other values.
        per_row: nats and counted tokens of every row of the text, to compare in pairs.
        beside: further values, by name.
    """

    value: float
    stderr: float | None = None
    is_bound: bool = False
    nats: float | None = None
    nats_stderr: float | None = None
    per_row: tuple[tuple[float, ...], tuple[int, ...]] | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without those of the rows."""
        return {
            "value": self.value, "stderr": self.stderr, "is_bound": self.is_bound,
            "nats": self.nats, "nats_stderr": self.nats_stderr, **self.beside,
        }  # fmt: skip


Cells = dict[tuple[str, str], Cell]
"""(system, column) -> what was measured."""


def read_cells(plan: Plan, table: PaperTable) -> tuple[Cells, list[str]]:
    """All cells of a table, and what there is to say about how they were measured.

    Every measurement is finished.

    Raises:
        UserError: table 6, and no document of the text ends.
    """
    readers = {
        "T5": _zero_shot_cells, "T6": _length_cells, "T7": _generated_cells,
    }  # fmt: skip
    return readers.get(table.name, _likelihood_cells)(plan, table)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "remove it and run the same command", finite=False)


def perplexity_cell(values: Mapping[str, Any], **beside: Any) -> Cell:
    """The cell of a likelihood as `Likelihood.to_dict` has it."""
    errors = [values[name] for name in ("stderr_noise", "stderr_data") if values[name] is not None]
    error, nats = max(errors, default=None), values["nats_per_token"]
    per_row = None
    if "nats_per_row" in values and "tokens_per_row" in values:
        per_row = (tuple(values["nats_per_row"]), tuple(values["tokens_per_row"]))
    told = ("exact_perplexity", "bits_per_byte", "stderr_noise", "stderr_data", "num_tokens",
            "estimator", "samples")  # fmt: skip
    return Cell(
        value=math.exp(nats),
        stderr=None if error is None else math.exp(nats) * error,
        is_bound=values["is_bound"],
        nats=nats,
        nats_stderr=error,
        per_row=per_row,
        beside={name: values[name] for name in told} | beside,
    )


def _likelihood_cells(plan: Plan, table: PaperTable) -> tuple[Cells, list[str]]:
    cells, notes = {}, []
    for row in table.built:
        values = _read(plan.result(table, row.system, "test"))
        cells[row.system, "perplexity"] = perplexity_cell(values)
        if not notes:
            given = "a BOS given, not counted" if values["bos"] else "every token counted, no BOS"
            notes.append(
                f"Test text: {plan.text(table).name}, {values['num_rows']:,} rows of "
                f"{plan.text(table).seq_len} tokens, {values['num_tokens']:,} counted; {given}."
            )
        if row.system == "d3pm":
            notes.append("D3PM has absorbing noise, T = 1,000 steps and the linear schedule.")
        if "variance" in row.measured:
            cells[row.system, "variance"] = _variance_cell(plan, table, row.system)
    return cells, notes


def _variance_cell(plan: Plan, table: PaperTable, system: str) -> Cell:
    noise = find_system(system, plan.scale, plan.text(table).seq_len).noise
    values = _read(plan.result(table, system, "variance"))
    row = next(row for row in values["rows"] if row["label"] == noise)
    found, loss = row["block_variance"], row["loss_variance"]
    return Cell(
        value=found["value"],
        stderr=found["stderr"],
        beside={"loss_variance": loss["value"], "loss_variance_stderr": loss["stderr"]},
    )


def _zero_shot_cells(plan: Plan, table: PaperTable) -> tuple[Cells, list[str]]:
    cells, missing, notes = {}, {}, []
    for row in table.built:
        values = _read(plan.result(table, row.system, "zero-shot"))
        for found in values["sets"]:
            if found["missing"] is not None:
                missing[found["task"]] = found["missing"]
                continue
            cells[row.system, found["task"]] = perplexity_cell(
                found, source=found["source"], detokenizer=found["detokenizer"]
            )
        frame, context = values["frame"], values["context"]
        notes = [
            f"Documents detokenised by the rules of each set, one after the other, in rows of "
            f"{context} tokens (ends of rows: {frame}), at most "
            f"{values['limit'] or 'all'} rows of a set."
        ]
    notes += [f"{name} is missing: {why}" for name, why in missing.items()]
    if plan.text(table).is_local and "wikitext" in table.columns:
        notes.append("Wikitext is the kind of text that the models were trained on, at this scale.")
    return cells, notes


def _length_cells(plan: Plan, table: PaperTable) -> tuple[Cells, list[str]]:
    text = plan.text(table)
    own = document_tokens(plan.step(f"prepare-{text.name}").product)
    cells: Cells = {
        ("data", "median"): Cell(value=float(np.median(own)), beside={"documents": len(own)}),
        ("data", "max"): Cell(value=float(own.max())),
    }
    for row in table.built:
        values = _read(plan.result(table, row.system, "lengths"))
        cut = {"share_cut": values["share_cut"], "documents": len(values["lengths"])}
        cells[row.system, "median"] = Cell(
            value=values["median"], stderr=_median_error(values["lengths"]), beside=cut
        )
        cells[row.system, "max"] = Cell(value=values["maximum"], beside=cut)
    documents = plan.scale.measure.documents
    notes = [
        f"{documents} documents each, from a given BOS until EOS, of at most "
        f"{plan.scale.measure.longest:,} tokens; a token sees the last {text.seq_len}. SEDD and "
        f"MDLM write one block of {text.seq_len} tokens, the BOS included. Nucleus 0.9 by the "
        "authors' rule. Lengths are without BOS and EOS.",
        f"The first row holds the {len(own):,} documents of the training text.",
    ]
    return cells, notes


def _median_error(lengths: list[int]) -> float:
    """Standard error of a median: half of what lies between the order statistics one standard
    deviation of the binomial around the middle."""
    ordered, count = sorted(lengths), len(lengths)
    reach = math.sqrt(count) / 2
    low, high = max(0, round(count / 2 - reach)), min(count - 1, round(count / 2 + reach))
    return (ordered[high] - ordered[low]) / 2


def document_tokens(directory: Path) -> np.ndarray:
    """Tokens of every whole document of a prepared training split, without BOS and EOS.

    Raises:
        UserError: no document ends.
    """
    rows = TokenRows(directory, "train")
    manifest = rows.manifest
    ends = []
    for first in range(0, rows.num_rows, ROWS_AT_A_TIME):
        numbers = np.arange(first, min(first + ROWS_AT_A_TIME, rows.num_rows))
        ids_BL = rows.rows(numbers).ids_BL.numpy()[:, int(manifest.row_bos) :]
        if manifest.row_eos:
            ids_BL = ids_BL[:, :-1]
        ends.append(np.flatnonzero(ids_BL.reshape(-1) == manifest.eos_id) + first * ids_BL.shape[1])
    found = np.concatenate(ends)
    if not manifest.document_eos or len(found) == 0:
        raise UserError(
            f"the text in {directory} has no EOS after its documents, so no document of T6 would "
            "end; prepare it with document_eos"
        )
    return np.diff(found, prepend=-1) - 1


def _generated_cells(plan: Plan, table: PaperTable) -> tuple[Cells, list[str]]:
    cells, warnings, values = {}, {}, {}
    for row in table.built:
        for column in row.measured:
            values = _read(plan.result(table, row.system, f"generated-{column}"))
            text, mean = values["text"], values["text"]["mean_perplexity"]
            cells[row.system, column] = Cell(
                value=mean["value"],
                stderr=mean["stderr"],
                is_bound=values["judge"]["is_bound"],
                beside={
                    "pooled_perplexity": text["perplexity"],
                    "pooled_interval": text["interval"],
                    "entropy": text["entropy"],
                    "distinct_2": text["distinct"]["2"],
                    "nfe": values["cost"]["nfe"]["value"],
                    "tokens_per_forward": values["cost"]["tokens_per_forward"],
                    "samples": text["num_samples"],
                },
            )
            warnings.update(dict.fromkeys(values["warnings"]))
    scorer, length = values["judge"], plan.text(table).seq_len
    notes = [
        f"{plan.scale.measure.generated} samples a cell, of L = {length} and 2L = {2 * length} "
        "tokens with the given BOS; EOS does not end them; nucleus 0.9 by the authors' rule; one "
        "token a pass (SEDD: as many analytic steps as tokens; D3PM: its 1,000 steps, less those "
        "that reveal nothing); no sample is rejected. Values are means over samples of each "
        "sample's perplexity, as the paper's.",
        f"Scorer: {scorer['name']}, {scorer['kind']}, {scorer['parameters']:,} parameters, windows "
        f"of {scorer['context']} tokens.",
        *warnings,
    ]
    return cells, [note.replace(f"{plan.out}/", "") for note in notes]
