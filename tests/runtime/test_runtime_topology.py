"""Topology files: every error names place, key and remedy."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from llm_runtime.runtime.topology import Engine, Topology, TopologyError, load_topology
from llm_runtime.runtime.topology.positions import key_lines
from llm_runtime.runtime.topology.schema import TABLES, describe, description, fields_of

ROOT = Path(__file__).parents[2]
MINIMAL = '[model]\npath = "m"\n[engine.main]\n'


def load(tmp_path: Path, text: str, *settings: str, port: int | None = None) -> Topology:
    file = tmp_path / "x.toml"
    file.write_text(text)
    return load_topology(file, settings, port).topology


def errors(tmp_path: Path, text: str, *settings: str, port: int | None = None) -> list[str]:
    with pytest.raises(TopologyError) as caught:
        load(tmp_path, text, *settings, port=port)
    return [line.replace(f"{tmp_path}/", "") for line in caught.value.errors]


def test_defaults(tmp_path: Path) -> None:
    topology = load(tmp_path, MINIMAL)
    assert topology.engine == {"main": Engine()}
    assert topology.models[0].path == "m"
    assert (topology.ingress.host, topology.ingress.port) == ("127.0.0.1", 8000)


@pytest.mark.parametrize("file", sorted((ROOT / "topology").glob("*.toml")), ids=lambda file: file.name)
def test_shipped_files_are_right(file: Path) -> None:
    assert load_topology(file).topology.engine


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL + "tpp = 1\n", "x.toml:4: engine.main.tpp: unknown key; did you mean engine.main.tp?"),
        (MINIMAL + "\n# a\n[modle]\n", "x.toml:6: modle: unknown table; did you mean [model]?"),
        (MINIMAL + "[engines.a]\n", "x.toml:4: engines: unknown table; did you mean [engine.main]?"),
        (MINIMAL + 'tp = "2"\n', 'x.toml:4: engine.main.tp: is "2"; give an integer from 1 to 64'),
        (MINIMAL + "tp = true\n", "x.toml:4: engine.main.tp: is true; give an integer from 1 to 64"),
        (MINIMAL + "tp = 0\n", "x.toml:4: engine.main.tp: is 0; give an integer from 1 to 64"),
        (MINIMAL + "tp = 1.5\n", "x.toml:4: engine.main.tp: is 1.5; give an integer from 1 to 64"),
        (MINIMAL + "kv_tokens = -1\n", "x.toml:4: engine.main.kv_tokens: is -1; give an integer of at least 1"),
        (MINIMAL + "chunk_tokens = 0\n", "x.toml:4: engine.main.chunk_tokens: is 0; give an integer of at least 1"),
        (
            MINIMAL + 'policy = "sjf"\n',
            'x.toml:4: engine.main.policy: there is no waiting policy "sjf"; give one of "fcfs", "lpm"',
        ),
        (MINIMAL + "run_ahead = 1\n", "x.toml:4: engine.main.run_ahead: is 1; give true or false"),
        (MINIMAL + "[ingress]\nport = 65536\n", "x.toml:5: ingress.port: is 65536; give an integer from 1 to 65535"),
        (
            MINIMAL + "[ingress]\nrequest_timeout_s = inf\n",
            "x.toml:5: ingress.request_timeout_s: is Infinity; give a number above 0, at most 86400",
        ),
        (
            MINIMAL + "[ingress]\nrequest_timeout_s = nan\n",
            "x.toml:5: ingress.request_timeout_s: is NaN; give a number above 0, at most 86400",
        ),
        (MINIMAL + '[node]\nname = "../x"\n', 'x.toml:5: node.name: is "../x"; give a string of letters'),
        ("[engine.main]\n", 'x.toml:1: model.path: missing; add path = "smollm2-135m-instruct" under [model]'),
        (
            "\n[model]\n[engine.main]\n",
            'x.toml:2: model.path: missing; add path = "smollm2-135m-instruct" under [model]',
        ),
        ('[model]\npath = ""\n[engine.a]\n', 'x.toml:2: model.path: is ""; give a string'),
        ('[model]\npath = "m"\n', "x.toml:1: engine: missing; add a table [engine.main]"),
        ('model = "m"\n[engine.main]\n', 'x.toml:1: model: is "m"; write a table [model]'),
        ('[model]\npath = "m"\n[engine]\ntp = 1\n', "x.toml:4: engine.tp: the keys of an engine stand under its name"),
        ('[model]\npath = "m"\n[engine."a.b"]\n', "x.toml:3: engine.a.b: an engine's name has lower-case letters"),
        ('[model]\npath = "m"\n[engine.tokenizer]\n', "x.toml:3: engine.tokenizer: the name is taken"),
        ('[model]\npath = "m"\n[engine.ingress0]\n', "x.toml:3: engine.ingress0: the name is taken"),
        (
            MINIMAL + 'role = "prefill"\n',
            'x.toml:4: engine.main.role: is "prefill", and no engine has the role "decode"; add one',
        ),
        (
            MINIMAL + "page_size = 32\nkv_tokens = 31\n",
            "x.toml:5: engine.main.kv_tokens: is 31, less than one page of 32 tokens; give at least 32, or lower",
        ),
        (
            '[model]\npath = "m"\nmax_model_len = 4096\n[engine.main]\nkv_tokens = 1024\n',
            "x.toml:5: engine.main.kv_tokens: is 1024, too small for one request of model.max_model_len = 4096 tokens; "
            "give at least 4096, or lower model.max_model_len",
        ),
        (
            '[model]\npath = "m"\ndtype = "int4"\n[engine.gpu]\ndevice = "cuda"\n',
            'x.toml:3: model.dtype: is "int4", which is for the CPU, and engine.gpu.device is "cuda"; give "bfloat16"',
        ),
        (MINIMAL + "tp = 1\ntp = 2\n", "x.toml:5: not valid TOML: Cannot overwrite a value"),
        (MINIMAL + "tp = \n", "x.toml:4: not valid TOML: "),
        (MINIMAL + 'policy = "lpm', "x.toml:4: not valid TOML: "),
    ],
)
def test_an_error_names_place_key_and_remedy(tmp_path: Path, text: str, expected: str) -> None:
    found = errors(tmp_path, text)
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_all_errors_are_listed(tmp_path: Path) -> None:
    found = errors(tmp_path, MINIMAL + "tp = 0\nfoo = 1\n[ingress]\nport = 0\n", "model.dtype=fp8")
    assert [line.split(": ")[1] for line in found] == [
        "model.dtype",
        "engine.main.tp",
        "engine.main.foo",
        "ingress.port",
    ]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"missing\.toml: no such file"):
        load_topology(tmp_path / "missing.toml")
    with pytest.raises(TopologyError, match="cannot be read"):
        load_topology(tmp_path)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(TopologyError, match=r"b\.toml: not UTF-8"):
        load_topology(tmp_path / "b.toml")


def test_a_byte_order_mark_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text(MINIMAL + "tp = 2\n", encoding="utf-8-sig")
    assert load_topology(tmp_path / "b.toml").topology.engine["main"].tp == 2


def test_lines_of_keys() -> None:
    text = "\n".join(
        [
            "# [no.table]",
            'a = """',
            'x = 1 ""',
            '"""',
            "b = '''",
            "y = 2'''",
            "[t]  # comment",
            '"quoted key" = 1',
            "dotted . 'k' = 2",
            'inline = { p = 1, q.r = [1, "]", { s = "}" }], t = 2 }',
            "list = [",
            "  'a', # = ]",
            "  { u = 1 },",
            "]",
            "date = 1979-05-27 07:32:00",
            "[t.sub]",
            "[[many]]",
            "k = 1",
            "[[many]]",
            "k = 2",
        ]
    )
    assert key_lines(text) == {
        ("a",): 2,
        ("b",): 5,
        ("t",): 7,
        ("t", "quoted key"): 8,
        ("t", "dotted"): 9,
        ("t", "dotted", "k"): 9,
        ("t", "inline"): 10,
        ("t", "inline", "p"): 10,
        ("t", "inline", "q"): 10,
        ("t", "inline", "q", "r"): 10,
        ("t", "inline", "q", "r", "s"): 10,
        ("t", "inline", "t"): 10,
        ("t", "list"): 11,
        ("t", "list", "u"): 13,
        ("t", "date"): 15,
        ("t", "sub"): 16,
        ("many",): 17,
        ("many", "0"): 17,
        ("many", "0", "k"): 18,
        ("many", "1"): 19,
        ("many", "1", "k"): 20,
    }
    assert key_lines(text.replace("\n", "\r\n")) == key_lines(text)


def test_set(tmp_path: Path) -> None:
    topology = load(
        tmp_path,
        MINIMAL + "tp = 1\n",
        "engine.main.tp=2",
        "engine.main.tp=3",
        "model.path=/a/b=c.gguf",
        "model.deterministic=true",
        "ingress.api_key=123",
        'model.served_name="quoted"',
        "supervision.period_s=3",
        "engine.main.policy=lpm",
        port=8123,
    )
    assert topology.engine["main"] == Engine(tp=3, policy="lpm")
    assert topology.models[0].path == "/a/b=c.gguf"
    assert topology.models[0].deterministic is True
    assert topology.ingress.api_key == "123"
    assert topology.models[0].served_name == "quoted"
    assert topology.supervision.period_s == 3.0
    assert topology.ingress.port == 8123


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("engine.main.tpp=2", "engine.main.tpp: unknown key; did you mean engine.main.tp?"),
        ("engine.mian.tp=2", "engine.mian.tp: unknown key; did you mean engine.main.tp?"),
        ("model.pth=x", "model.pth: unknown key; did you mean model.path?"),
        ("tp=2", "tp: unknown key; did you mean engine.main.tp?"),
        ("worker=2", "worker: unknown key; did you mean ingress.workers?"),
        ("engine.main=2", "engine.main: is a table; set one of its keys, such as engine.main.role"),
        ("engine.main.tp", "engine.main.tp: give KEY=VALUE, such as engine.main.tp=2"),
        ("=", ": unknown key; did you mean"),
        ("engine.main.tp=two", 'engine.main.tp: is "two"; give an integer from 1 to 64'),
        ("engine.main.tp=2\nfoo=3", "engine.main.tp: is"),
        ("model.deterministic=yes", 'model.deterministic: is "yes"; give true or false'),
        ("engine.main.kv_tokens=8", "engine.main.kv_tokens: is 8, less than one page of 16 tokens"),
    ],
)
def test_an_error_of_an_argument_names_the_argument(tmp_path: Path, setting: str, expected: str) -> None:
    found = errors(tmp_path, MINIMAL, setting)
    assert len(found) == 1
    assert found[0].startswith(f"--set {setting}: {expected}")


TWO = """[[model]]
path = "m"
[[model]]
path = "some/other"
served_name = "o"
[engine.main]
model = "m"
[engine.second]
model = "o"
"""


def test_several_models(tmp_path: Path) -> None:
    topology = load(tmp_path, TWO, "model.1.dtype=float32", "model.0.max_model_len=100")
    assert [model.served_name for model in topology.models] == ["m", "o"]
    assert (topology.models[1].dtype, topology.models[0].max_model_len) == ("float32", 100)
    assert [list(topology.engines_of(index)) for index in range(2)] == [["main"], ["second"]]
    assert load(tmp_path, MINIMAL + 'model = "m"\n').engine["main"].model == "m"


@pytest.mark.parametrize(
    ("text", "setting", "expected"),
    [
        (TWO.replace('model = "o"\n', ""), (), 'x.toml:8: engine.second.model: missing; give "m" or "o"'),
        (TWO + "[engine.x]\n", (), 'x.toml:10: engine.x.model: missing; give "m" or "o"'),
        (TWO + '[engine.x]\nmodel = "p"', (), 'x.toml:11: engine.x.model: is "p", which is not served; give "m" or'),
        (TWO.replace('"o"', '"m"'), (), 'x.toml:5: model.1.served_name: is "m", and so is that of model.0; give'),
        (TWO + '[[model]]\npath = "x"', (), 'x.toml:10: model.2: "x" has no engine; add a table [engine.NAME]'),
        (TWO + "[[model]]", (), 'x.toml:10: model.2.path: missing; add path = "smollm2-135m-instruct" under [[model]]'),
        (TWO + "[engine.model0]", (), "x.toml:10: engine.model0: the name is taken by another process"),
        (TWO + '[engine.p]\nmodel = "m"\nrole = "prefill"\n[engine.d]\nmodel = "o"\nrole = "decode"', (),
         'x.toml:12: engine.p.role: is "prefill", and no engine of its model has the role "decode"'),
        (TWO, ("model.0.max_model_len=40000",),
         "x.toml:6: engine.main.kv_tokens: is 32768, too small for one request of model.0.max_model_len = 40000"),
        (TWO, ("model.path=x",), "--set model.path=x: model.path: unknown key; did you mean model.0.path?"),
        (TWO, ("model.2.path=x",), "--set model.2.path=x: model.2.path: unknown key; did you mean model.0.path?"),
        (TWO, ("model.1.dtype=x",), '--set model.1.dtype=x: model.1.dtype: is "x"; give one of "auto"'),
        ("model = [1]\n[engine.main]", ("model.0.path=x",), "--set model.0.path=x: model.0.path: unknown key"),
        ("model = []\n[engine.main]", (), "x.toml:1: model.path: missing; add path"),
        (MINIMAL + 'model = "o"', (), 'x.toml:4: engine.main.model: is "o", which is not served; give "m"'),
    ],
)  # fmt: skip
def test_errors_of_several_models(tmp_path: Path, text: str, setting: tuple[str, ...], expected: str) -> None:
    assert errors(tmp_path, text, *setting)[0].startswith(expected)


def test_an_error_of_the_port_names_the_option(tmp_path: Path) -> None:
    assert errors(tmp_path, MINIMAL, port=70000) == [
        "--port 70000: ingress.port: is 70000; give an integer from 1 to 65535"
    ]


def test_an_error_found_later_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.toml"
    file.write_text(MINIMAL + "\ntp = 5\n")
    loaded = load_topology(file, ["engine.main.kv_tokens=64"])
    assert str(loaded.error("engine.main.tp", "too many")) == f"{file}:5: engine.main.tp: too many"
    assert str(loaded.error("engine.main.threads", "none")) == f"{file}:3: engine.main.threads: none"
    assert str(loaded.error("engine.main.kv_tokens", "x")).startswith("--set engine.main.kv_tokens=64: engine.main.kv_")


def test_where_relative_paths_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.toml"
    file.write_text(MINIMAL)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_topology(file).base_of("model.path") == tmp_path
    assert load_topology(file, ["model.path=m"]).base_of("model.path") == elsewhere


def _default(field: msgspec.inspect.Field) -> str:
    if field.required:
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, str):
        return f'`"{field.default}"`'
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def test_the_documentation_lists_every_key_with_type_and_default() -> None:
    documented = (ROOT / "docs/topology.md").read_text()
    expected = []
    for header, table in TABLES.items():
        expected.append(f"## `[{header}]`")
        for name, field in fields_of(table).items():
            expected.append(f"| `{name}` | {describe(field.type)} | {_default(field)} | {description(field.type)} |")
    lines = documented.splitlines()
    assert [line for line in lines if line.startswith(("## `[", "| `")) and "| `RUNTIME" not in line] == expected
