"""Which steps a table needs: a small graph of `blockdiff` commands.

    OUT/data/NAME        rows of tokens                 blockdiff prepare
    OUT/recipes/RUN.yaml the recipe of a run
    OUT/runs/RUN         a training run                 blockdiff train
    OUT/results/*.json   what was measured of it        blockdiff eval, zero-shot, lengths, ...
    OUT/logs/STEP.log    the output of a step
    OUT/steps/STEP.json  what a step was made from, see `step_cache`
    OUT/T3.md, T3.json   the table

Tables share steps: what one has made the next one finds.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from blockdiffusion.errors import UserError, shown
from blockdiffusion.studies.reproduce.paper import PaperTable
from blockdiffusion.studies.reproduce.scales import Scale, Text, TrainedScorer
from blockdiffusion.studies.reproduce.systems import find_system

TOP_P = ("--top-p", "0.9", "--top-p-rule", "authors")  # the paper's sampling
SCORER_RUN = "judge"  # the name of its run and of its text
ONE_BLOCK = ("sedd", "mdlm")  # L tokens at most, in the paper


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a training step trains.

    Attributes:
        recipe: as its YAML file holds it.
        tokens: that all its updates read, a row counted once.
        parameters: of the network, embeddings included.
        flops: that training takes, about; without attention's own.
    """

    recipe: Mapping[str, Any]
    steps: int
    tokens: int
    parameters: int
    flops: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One command.

    Attributes:
        name: unique in a directory of results.
        command: the arguments of `blockdiff`.
        needs: steps that come before, by name.
        product: a directory, or the JSON file of a measurement.
        models: hub ids and directories that are read, besides the products of `needs`.
        files: local files that are read.
        run: of a training step.
    """

    name: str
    kind: Literal["prepare", "train", "measure"]
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    product: Path
    models: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    run: Run | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that the tables need, every step after those that it needs.

    Attributes:
        data: `--data` as given, name -> path.
        scorer: of table 7, from `--scorer` or a run of this plan; None where no table has one.
    """

    tables: tuple[PaperTable, ...]
    scale: Scale
    out: Path
    data: Mapping[str, Path]
    scorer: str | None
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        """The step called `name`."""
        return next(step for step in self.steps if step.name == name)

    def result(self, table: PaperTable, system: str, kind: str) -> Path:
        """The file of a measurement of a table's system."""
        return self.out / "results" / f"{_run_name(self.scale, table, system)}-{kind}.json"

    def text(self, table: PaperTable) -> Text:
        """The text that a table is about."""
        return self.scale.texts[table.corpus]


def make_plan(
    tables: Sequence[PaperTable],
    scale: Scale,
    out: Path,
    data: Sequence[str] = (),
    scorer: str | None = None,
) -> Plan:
    """The plan of `tables` at a scale.

    Args:
        data: `NAME=PATH` of local text.
        scorer: a model that replaces the scale's scorer.

    Raises:
        UserError: a name that nothing reads, a path that does not exist, text that is missing, or a
            scorer that cannot be one.
    """
    planner = _Planner(scale=scale, out=out, data=_local_data(data, scale), steps={})
    for table in tables:
        planner.add_table(table, scorer)
    return Plan(
        tables=tuple(tables),
        scale=scale,
        out=out,
        data=planner.data,
        scorer=planner.scorer,
        steps=tuple(planner.steps.values()),
    )


def zero_shot_names() -> list[str]:
    """The sets of table 5."""
    from blockdiffusion.evaluate.zero_shot.options import SUITES

    return [task.name for task in SUITES["paper"]]


def _local_data(entries: Sequence[str], scale: Scale) -> dict[str, Path]:
    trained = [SCORER_RUN] if isinstance(scale.scorer, TrainedScorer) else []
    own = [text.option for text in scale.texts.values()]
    known = list(dict.fromkeys([*own, *trained, *zero_shot_names()]))
    found = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(
                f"--data is {shown(entry)}; it must be NAME=PATH, and the nearest name is {near} "
                f"(at the scale {scale.name} there are {', '.join(known)})"
            )
        place = Path(path).expanduser()
        if not place.exists():
            raise UserError(f"there is no file or folder {path!r} to read {name} from")
        found[name] = place
    return found


def _run_name(scale: Scale, table: PaperTable, system: str) -> str:
    return f"{scale.texts[table.corpus].name}-{system}"


@dataclass(kw_only=True)
class _Planner:
    scale: Scale
    out: Path
    data: dict[str, Path]
    steps: dict[str, Step]
    scorer: str | None = None

    def add(self, step: Step) -> str:
        """Puts a step in, once; returns its name."""
        return self.steps.setdefault(step.name, step).name

    def add_table(self, table: PaperTable, scorer: str | None) -> None:
        text = self.scale.texts[table.corpus]
        self._check_text(table, text)
        match table.name:
            case "T3" | "T4":
                for row in table.built:
                    self._test(text, row.system)
            case "T1" | "T2" | "T8":
                for row in table.built:
                    self._test(text, row.system)
                    if "variance" in row.measured:
                        self._variance(text, row.system)
            case "T5":
                self._check_zero_shot(table, text)
                for row in table.built:
                    self._zero_shot(text, row.system)
            case "T6":
                for row in table.built:
                    self._lengths(text, row.system)
            case "T7":
                scorer_model, needs = self._add_scorer(scorer)
                for row in table.built:
                    for column in row.measured:
                        self._generate(text, row.system, column, scorer_model, needs)

    # --- text and models -------------------------------------------------------------------------

    def _check_text(self, table: PaperTable, text: Text) -> None:
        if text.is_local and text.option not in self.data:
            raise UserError(
                f"{table.name} at the scale {self.scale.name} needs {text.option}, which is not "
                f"downloaded; say where its folder is with --data {text.option}=PATH"
            )
        if table.name == "T6" and not text.document_eos:
            raise UserError(
                f"T6 measures the tokens until an EOS, and the text {text.name} has none between "
                "its documents; prepare it with document_eos"
            )

    def _check_zero_shot(self, table: PaperTable, text: Text) -> None:
        if text.is_local and not any(name in self.data for name in zero_shot_names()):
            raise UserError(
                f"T5 at the scale {self.scale.name} measures local text of other kinds, and none "
                f"is given; give --data NAME=PATH for some of {', '.join(zero_shot_names())}"
            )

    def _prepare(self, text: Text) -> str:
        local = self.data.get(text.option)
        where = "" if local is None else f"={local}"
        command = ["prepare", f"{text.data_set}{where}", "--out", self._rows_of(text.name)]
        command += ["--tokenizer", text.tokenizer, "--seq-len", str(text.seq_len)]
        if text.tested is not None:
            command += ["--valid", f"{text.data_set}:{text.tested}{where}"]
        command += ["--row-bos"] * text.row_bos + ["--row-eos"] * text.row_eos
        command += ["--no-document-eos"] * (not text.document_eos)
        return self.add(
            Step(
                name=f"prepare-{text.name}",
                kind="prepare",
                command=tuple(command),
                product=Path(self._rows_of(text.name)),
                files=() if local is None else (local,),
            )
        )

    def _rows_of(self, name: str) -> str:
        return str(self.out / "data" / name)

    def _run_of(self, name: str) -> str:
        return str(self.out / "runs" / name)

    def _train(self, text: Text, name: str) -> str:
        """The step that trains a system, after those that it starts from."""
        system = find_system(name, self.scale, text.seq_len)
        needs = [self._prepare(text)]
        model = {**self.scale.model, **system.model}
        if system.block_size is None:
            model.pop("cond_dim", None)  # a network without conditioning
        if system.start is not None:
            needs.append(self._train(text, system.start))
            model["init_from"] = self._run_of(f"{text.name}-{system.start}")
        return self._add_run(
            f"{text.name}-{name}",
            needs,
            data=self._rows_of(text.name),
            model=model,
            objective=system.objective,
            search=system.search,
            train={
                "steps": system.steps,
                "batch_size": text.batch_size,
                "micro_batch_size": text.micro_batch_size,
            },
            size=_Size(
                text.seq_len, text.tokenizer, system.streams(text.seq_len), system.noisy_copies
            ),
        )

    def _add_run(
        self,
        name: str,
        needs: Sequence[str],
        *,
        data: str,
        model: Mapping[str, Any],
        objective: Mapping[str, Any],
        search: Mapping[str, Any],
        train: Mapping[str, Any],
        size: _Size,
    ) -> str:
        recipe = {
            "out": self._run_of(name),
            "data": {"path": data},
            "model": dict(model),
            "objective": dict(objective),
            "train": {**self.scale.train, **train},
            "optim": dict(self.scale.optim),
            "eval": dict(self.scale.evaluation),
            "sample": {"every": None},
            "checkpoint": dict(self.scale.checkpoint),
        }
        if search:
            recipe["search"] = dict(search)
        steps, rows = train["steps"], train["batch_size"]
        parameters, flops = size.network(model)
        return self.add(
            Step(
                name=f"train-{name}",
                kind="train",
                command=("train", str(self.out / "recipes" / f"{name}.yaml")),
                needs=tuple(needs),
                product=Path(self._run_of(name)),
                run=Run(
                    recipe=recipe,
                    steps=steps,
                    tokens=steps * rows * size.seq_len,
                    parameters=parameters,
                    flops=flops * steps * rows * size.seq_len,
                ),
            )
        )

    def _add_scorer(self, scorer: str | None) -> tuple[str, list[str]]:
        """The scorer of table 7 and the steps that make it."""
        self._check_scorer(scorer)
        spec = self.scale.scorer
        if scorer is not None or isinstance(spec, str):
            self.scorer = scorer or str(spec)
            return self.scorer, []
        prepared = self.add(
            Step(
                name="prepare-judge",
                kind="prepare",
                command=(
                    "prepare", str(self.data[SCORER_RUN]), "--out", self._rows_of(SCORER_RUN),
                    "--tokenizer", spec.tokenizer, "--seq-len", str(spec.seq_len),
                ),
                product=Path(self._rows_of(SCORER_RUN)),
                files=(self.data[SCORER_RUN],),
            )
        )  # fmt: skip
        trained = self._add_run(
            SCORER_RUN,
            [prepared],
            data=self._rows_of(SCORER_RUN),
            model=spec.model,
            objective={"name": "ar"},
            search={},
            train={"steps": spec.steps, "batch_size": spec.batch_size},
            size=_Size(spec.seq_len, spec.tokenizer, 1, 1),
        )
        self.scorer = self._run_of(SCORER_RUN)
        return self.scorer, [trained]

    def _check_scorer(self, scorer: str | None) -> None:
        if scorer is not None:
            place, runs = Path(scorer).resolve(), (self.out / "runs").resolve()
            if place.is_relative_to(runs) and place.relative_to(runs).parts[:1] != (SCORER_RUN,):
                raise UserError(
                    f"the scorer {scorer} is one of the models under test, or of their run; take "
                    "another model, trained on other text"
                )
            return
        if isinstance(self.scale.scorer, str):
            return
        if SCORER_RUN not in self.data:
            raise UserError(
                f"T7 at the scale {self.scale.name} trains a scorer on text of its own, which is "
                "not given; say where it is with --data judge=PATH, or name a model with --scorer"
            )
        place = self.data[SCORER_RUN].resolve()
        for text in self.scale.texts.values():
            other = self.data.get(text.option)
            if other is not None and _overlap(place, other.resolve()):
                raise UserError(
                    f"--data judge={self.data[SCORER_RUN]} is the text that the models under test "
                    "are trained on, whose copies such a scorer would reward; give other text"
                )

    # --- measurements ----------------------------------------------------------------------------

    def _measure(self, text: Text, system: str, kind: str, options: Sequence[str], **step) -> None:
        """A command about a trained system whose result is a JSON file."""
        trained = self._train(text, system)
        run, name = f"{text.name}-{system}", f"{text.name}-{system}-{kind}"
        product = self.out / "results" / f"{name}.json"
        command, *others = options
        more_needs = step.pop("needs", ())
        self.add(
            Step(
                name=name,
                kind="measure",
                command=(command, self._run_of(run), *others, "--json", str(product)),
                needs=(trained, self._prepare(text), *more_needs),
                product=product,
                **step,
            )
        )

    def _test(self, text: Text, name: str) -> None:
        system, measure = find_system(name, self.scale, text.seq_len), self.scale.measure
        options = ["eval", "--data", self._rows_of(text.name), "--estimator", system.estimator]
        options += ["--mc-samples", str(measure.samples), "--per-row"]
        if measure.rows is not None:
            options += ["--limit", str(measure.rows)]
        self._measure(text, name, "test", options)

    def _variance(self, text: Text, name: str) -> None:
        system, measure = find_system(name, self.scale, text.seq_len), self.scale.measure
        options = ["variance", "--data", self._rows_of(text.name), "--estimators", system.noise]
        options += ["--block-sizes", str(system.block_size), "--no-gradients"]
        options += ["--batch-size", str(measure.variance_batch), "--replicates", "2"]
        options += ["--batches", str(measure.variance_batches)]
        self._measure(text, name, "variance", options)

    def _zero_shot(self, text: Text, name: str) -> None:
        measure = self.scale.measure
        options, files = ["zero-shot", "--mc-samples", str(measure.samples)], []
        if measure.zero_shot_rows is not None:
            options += ["--limit", str(measure.zero_shot_rows)]
        for task in zero_shot_names():
            if task in self.data:
                options += ["--local", f"{task}={self.data[task]}"]
                files.append(self.data[task])
            if text.is_local and task in self.data:
                options += ["--tasks", task]
        self._measure(text, name, "zero-shot", options, files=tuple(files))

    def _lengths(self, text: Text, name: str) -> None:
        measure = self.scale.measure
        longest = text.seq_len - 1 if name in ONE_BLOCK else measure.longest
        options = ["lengths", "--num-samples", str(measure.documents)]
        options += ["--max-new-tokens", str(longest), "--batch-size", str(measure.batch), "--bos"]
        if name not in ONE_BLOCK:
            options += ["--window", str(text.seq_len)]
        self._measure(text, name, "lengths", [*options, *TOP_P])

    def _generate(
        self, text: Text, name: str, column: str, scorer: str, needs: Sequence[str]
    ) -> None:
        measure = self.scale.measure
        length = text.seq_len * {"L": 1, "2L": 2}[column]
        options = ["generate-eval", "--scorer", scorer, "--num-samples", str(measure.generated)]
        options += ["--max-new-tokens", str(length - 1), "--batch-size", str(measure.batch)]
        options += ["--bos", "--no-eos", *TOP_P]
        if column == "2L" and name not in ONE_BLOCK:
            options += ["--window", str(text.seq_len)]
        models = () if needs else (scorer,)
        self._measure(text, name, f"generated-{column}", options, needs=needs, models=models)


@dataclass(frozen=True, slots=True)
class _Size:
    """What a network's cost depends on, besides its recipe."""

    seq_len: int
    tokenizer: str
    streams: int
    scored: int

    def network(self, model: Mapping[str, Any]) -> tuple[int, float]:
        """Parameters, and floating-point operations for a token of an update.

        Six operations for each parameter of the layers and token that is read, and of the output
        and token that is scored: two forward, four backward.
        """
        width, vocab = model["hidden_size"], VOCABULARIES.get(self.tokenizer)
        if vocab is None:
            vocab = int(self.tokenizer.removeprefix("bpe:")) + 1
        layers = 12 * width**2 * model["num_hidden_layers"]
        flops = 6 * (layers * self.streams + vocab * width * self.scored)
        return layers + 2 * vocab * width, float(flops)


VOCABULARIES = {"byte": 258, "gpt2": 50_258, "bert-base-uncased": 30_522}


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def recipe_text(run: Run) -> bytes:
    """The recipe as a YAML file holds it."""
    return yaml.safe_dump(dict(run.recipe), sort_keys=False).encode()
