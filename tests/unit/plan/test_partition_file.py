"""A saved partition: text and back, what a file may say, and how a step follows it."""

import dataclasses
import json

import pytest

from smp_tf.config import resolve
from smp_tf.errors import ConfigError, PartitionError
from smp_tf.plan.given import Given
from smp_tf.plan.partition_file import parse_partition, partition_file_of
from smp_tf.plan.plan_step import plan_step
from tests.unit.plan.example_graphs import chain, residual, tied


def plan(graph, given=None, owner=None, layers=None, **config):
    partitions = config.setdefault("partitions", 2)
    config = resolve({"microbatches": 4, **config}, partitions)
    return plan_step(graph, config, owner or {}, layers or {}, given=Given(given))


def saved(found, tmp_path):
    path = tmp_path / "partition.json"
    found.save(path)
    return json.loads(path.read_text())


def given(content, partitions=2):
    return parse_partition(json.dumps(content), partitions, "'p.json'")


def by_layer(found):
    return {
        layer: p for layer, p in found.partition_of_layer.items() if layer != "model"
    }


def renamed(graph, old, new):
    """The same trace in a process where Keras has counted on."""

    def name(layer):
        return layer.replace(old, new)

    nodes = (dataclasses.replace(n, layer=name(n.layer)) for n in graph.nodes)
    variables = (
        dataclasses.replace(v, name=f"{new}/{v.name}") for v in graph.variables
    )
    return dataclasses.replace(graph, nodes=tuple(nodes), variables=tuple(variables))


def resized(graph, batch):
    """The same model, traced with other microbatches."""

    def spec(each):
        is_row = each.shape == (4, 8)
        return dataclasses.replace(each, shape=(batch, 8)) if is_row else each

    nodes = (
        dataclasses.replace(n, outputs=tuple(map(spec, n.outputs))) for n in graph.nodes
    )
    return dataclasses.replace(graph, nodes=tuple(nodes))


# Text and back.


def test_a_file_is_read_by_people_and_by_us(tmp_path):
    found = plan(chain(2))
    path = tmp_path / "partition.json"
    found.save(path)
    assert path.read_text().splitlines() == [
        "{",
        ' "format": "smp_tf partition",',
        ' "version": 1,',
        ' "partitions": 2,',
        f' "fingerprint": "{chain(2).fingerprint()}",',
        ' "atoms": [',
        '  {"partition": 0, "layers": ["model/dense_0"], "variables": ["w0:0"]},',
        '  {"partition": 1, "layers": ["model/dense_1"], "variables": ["w1:0"]}',
        " ]",
        "}",
    ]
    again = parse_partition(path.read_text(), 2, "'p.json'")
    assert again.to_text() == path.read_text()
    compact = given(json.loads(path.read_text()))
    assert again == compact and again.digest() == compact.digest()
    moved = dataclasses.replace(again, rows=again.rows[::-1])
    assert moved.digest() != again.digest()


def test_saving_replaces_a_file_at_once_and_leaves_no_other(tmp_path):
    path = tmp_path / "partition.json"
    path.write_text("old")
    plan(chain(2)).save(path)
    assert json.loads(path.read_text())["version"] == 1
    assert [each.name for each in tmp_path.iterdir()] == ["partition.json"]
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError):
        plan(chain(2)).save(folder)  # cannot be replaced
    with pytest.raises(FileNotFoundError):
        plan(chain(2)).save(tmp_path / "nowhere" / "partition.json")
    assert {each.name for each in tmp_path.iterdir()} == {"folder", "partition.json"}


# What a file may say.


def test_a_file_is_read_for_a_configuration(tmp_path):
    found = plan(chain(2))
    found.save(tmp_path / "p.json")
    config = resolve({"partition_file": tmp_path / "p.json"}, 2)
    read = partition_file_of(config)
    assert read.num_partitions == 2 and len(read.rows) == 2
    assert partition_file_of(resolve(None, 2)) is None
    missing = resolve({"partition_file": "/nowhere/p.json"}, 2)
    with pytest.raises(ConfigError, match=r"cannot be read.*file='/nowhere/p.json'; s"):
        partition_file_of(missing)
    (tmp_path / "p.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read: 'utf-8' codec"):
        partition_file_of(config)


@pytest.mark.parametrize("text", ["", "{", "partition = 0", '{"a": 1,}'])
def test_what_is_no_json(text):
    with pytest.raises(ConfigError, match="must hold JSON: .*partition_file='p.json'"):
        parse_partition(text, 2, "'p.json'")


def _changed(content, change):
    *path, key = change[:-1]
    place = content
    for each in path:
        place = place[each]
    if change[-1] is KeyError:
        del place[key]
    else:
        place[key] = change[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("format", "checkpoint"), '`format` must be "smp_tf partition": format="che'),
        (("version", 2), "`version` must be 1: version=2"),
        (("version", True), "`version` must be 1: version=true"),
        (("partitions", 3), "`partitions` must be 2, as in the configuration: part"),
        (("partitions", "2"), '`partitions` must be 2, .*: partitions="2"'),
        (("fingerprint", 7), "`fingerprint` must be a text: fingerprint=7"),
        (("fingerprint", KeyError), "the file must have the keys .*found="),
        (("atoms", {}), "`atoms` must be a list"),
        (("more", 1), "the file must have the keys .*'more'"),
        (("atoms", 1, "partition", 2), r"atoms\[1\]: `partition` must be a number from"
         " 0 to 1: partition=2"),
        (("atoms", 1, "partition", -1), "0 to 1: partition=-1"),
        (("atoms", 1, "partition", 1.0), "0 to 1: partition=1.0"),
        (("atoms", 0, "partition", True), "0 to 1: partition=true"),
        (("atoms", 0, "layers", "dense"), '`layers` must be a list of names: layers="'),
        (("atoms", 0, "variables", [1]), "`variables` must be a list of names"),
        (("atoms", 0, "layers", KeyError), r"atoms\[0\] must have the keys .*layers"),
        (("atoms", 0, 7), r"atoms\[0\] must have the keys .*found=int"),
        (("atoms", 1, "partition", 0), r"at least one atom: empty partitions=\[1\]"),
        (("atoms", []), r"at least one atom: empty partitions=\[0, 1\]"),
    ],
)  # fmt: skip
def test_what_no_file_may_say(tmp_path, change, message):
    content = saved(plan(chain(2)), tmp_path)
    given(content)
    _changed(content, change)
    with pytest.raises(ConfigError, match=message) as caught:
        given(content)
    assert str(caught.value).startswith("`partition_file`: ")
    assert "; partition_file='p.json'; " in str(caught.value)


# How a step follows it.


@pytest.mark.parametrize("make", [lambda: chain(5), lambda: residual(6), tied])
def test_the_same_plan_again(tmp_path, make):
    found = plan(make())
    content = saved(found, tmp_path)
    again = plan(make(), given(content))
    assert dataclasses.replace(again, advice=()) == dataclasses.replace(
        found, advice=()
    )


def test_an_edited_row_moves_a_layer(tmp_path):
    content = saved(plan(chain(5)), tmp_path)
    rows = content["atoms"]
    assert [row["partition"] for row in rows].count(1) in (2, 3)
    for row in rows:
        row["partition"] = int(row["layers"] == ["model/dense_4"])
    found = plan(chain(5), given(content))
    assert by_layer(found) == {f"model/dense_{i}": int(i == 4) for i in range(5)}
    assert found.owner == {i: int(i == 4) for i in range(5)}


def test_names_may_differ_where_the_trace_is_equal(tmp_path):
    content = saved(plan(chain(4)), tmp_path)
    content["atoms"][1]["partition"] = 1
    wanted = [row["partition"] for row in content["atoms"]]
    found = plan(renamed(chain(4), "dense", "dense_9"), given(content))
    assert list(found.partition_of_atom) == wanted


@pytest.mark.parametrize("make", [lambda: chain(5), lambda: residual(6), tied])
def test_another_batch_is_followed_by_name(tmp_path, make):
    """What a model does between its layers has one name everywhere; order tells it."""
    found = plan(make())
    content = saved(found, tmp_path)
    other = resized(make(), 32)
    assert other.fingerprint() != make().fingerprint()
    again = plan(other, given(content), microbatches=2)
    assert again.partition_of_atom == found.partition_of_atom
    assert again.owner == found.owner


def test_rows_in_another_order_are_followed_by_name(tmp_path):
    found = plan(chain(5))
    content = saved(found, tmp_path)
    content["atoms"].reverse()
    assert plan(chain(5), given(content)).owner == found.owner


def test_another_number_of_atoms_is_followed_by_name(tmp_path):
    """residual(6) has sums between its layers, a file made by hand need not."""
    found = plan(residual(6))
    content = saved(found, tmp_path)
    content["atoms"] = [row for row in content["atoms"] if row["variables"]]
    content["fingerprint"] = ""
    with pytest.raises(PartitionError, match=r"where every layer is: layers=\['model'"):
        plan(residual(6), given(content))
    sums = [{"partition": p, "layers": ["model"], "variables": []} for p in (0, 1)]
    content["atoms"] += sums
    again = plan(residual(6), given(content))
    # A sum goes where the layer before it is.
    assert again.partition_of_atom == found.partition_of_atom


def test_an_unknown_layer_is_named(tmp_path):
    content = saved(plan(chain(4)), tmp_path)
    with pytest.raises(PartitionError) as caught:
        plan(chain(5), given(content))
    text = str(caught.value)
    assert "the file must say where every layer is" in text
    assert "layers=['model/dense_4'] variables=['w4:0']" in text
    assert "partition_file='p.json'; add a row for it" in text


def test_a_row_that_nothing_needs_is_no_error(tmp_path):
    content = saved(plan(chain(5)), tmp_path)
    assert plan(chain(4), given(content)).owner == {0: 0, 1: 0, 2: 1, 3: 1}


def test_what_shares_a_variable_cannot_be_torn_apart(tmp_path):
    """embed and head are one row; a file made by hand says otherwise."""
    content = saved(plan(tied()), tmp_path)
    shared, dense = content["atoms"]
    assert shared["layers"] == ["model/embed", "model"]
    head = {"partition": 1, "layers": ["model"], "variables": []}
    shared["layers"].remove("model")
    content["atoms"] = [shared, dense, head]
    with pytest.raises(PartitionError) as caught:
        plan(tied(), given(content))
    text = str(caught.value)
    assert "must be on one partition: layer 'model/embed' on [0]" in text
    assert "layer 'model' on [1]" in text
    assert "layers=['model/embed', 'model']" in text and "'p.json'" in text


def test_earlier_steps_win(tmp_path):
    content = saved(plan(chain(4)), tmp_path)
    owner, layers = {0: 1, 1: 1}, {"model/dense_0": 1, "model/dense_1": 1}
    for row in content["atoms"]:
        row["partition"] = int(row["layers"] == ["model/dense_3"])
    found = plan(chain(4), given(content), owner, layers)
    assert found.owner == {0: 1, 1: 1, 2: 0, 3: 1}  # the rest as the file has it
    # What neither knows goes where the atom before it is, as without a file.
    found = plan(chain(5), given(content), owner, layers)
    assert found.owner == {0: 1, 1: 1, 2: 0, 3: 1, 4: 1}
