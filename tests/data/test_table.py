"""CSV and Parquet of the user's own: attributes, and whatever can be in a file."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastpie import FastpieError
from fastpie.data import ManifestDataset, read_manifest


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def column(manifest, name):
    return manifest.table.column(name).to_pylist()


def test_attributes_come_by_their_names_or_those_given(write):
    source = write(
        "path,sample_id,patient,split,sex,age,view,site,frame,scanner\n"
        "a.png,1, p1 ,train,Female,41,PA,chest,2,x\n"
        "b.png,2,,,m,058Y, ,,,y\n"
        "c.png,3,p1,train,?,411,AP,,1.5,z\n"
        "d.png,4,p2,test,O,006M,AP,,-1,\n"
    )
    manifest = read_manifest(source, group="patient")
    names = ["sample_id", "path", "group", "split", "sex", "age", "view", "site", "frame"]
    assert manifest.table.column_names == [*names, "patient", "scanner"]
    assert column(manifest, "group") == ["p1", None, "p1", "p2"]
    assert column(manifest, "split") == ["train", None, "train", "test"]
    assert column(manifest, "sex") == ["F", "M", None, None]
    assert column(manifest, "age") == [41, 58, None, 0.5]
    assert column(manifest, "view") == ["PA", None, "AP", "AP"]
    assert column(manifest, "frame") == [2, None, None, None]
    assert column(manifest, "scanner") == ["x", "y", "z", ""]
    types = {n: manifest.table.schema.field(n).type for n in names}
    assert types["age"] == pa.float32()
    assert types["frame"] == pa.int64()
    assert {types[n] for n in names if n not in ("age", "frame")} == {pa.large_string()}
    assert (manifest.task, manifest.class_names, len(manifest)) == (None, None, 4)
    with pytest.raises(FastpieError, match=r"column of group \['lesion'\]"):
        read_manifest(source, group="lesion")


def test_labels_are_typed(write):
    source = write("path,label,a,b\nx.png,2,1,\ny.png,,0,1\n")
    manifest = read_manifest(source, labels="label")
    assert manifest.table.schema.field("label").type == pa.int64()
    assert column(manifest, "label") == [2, -1]
    assert manifest.task == "multiclass"
    manifest = read_manifest(source, labels=["b", "a"], task="multilabel")
    assert manifest.table.schema.field("label").type == pa.list_(pa.float32(), 2)
    values = column(manifest, "label")
    assert math.isnan(values[0][0])
    assert [values[0][1], *values[1]] == [1, 1, 0]
    assert manifest.class_names == ["b", "a"]


def test_parquet_of_any_types(tmp_path):
    table = pa.table(
        {
            "path": pa.array(["a.png", "b.png"]).dictionary_encode(),
            "sample_id": pa.array([7, 10]),
            "label": pa.array(["x", None]).dictionary_encode(),
            "group": pa.array([3, None], pa.int32()),
            "age": pa.array([30.5, math.nan]),
            "frame": pa.array([0, None], pa.int16()),
            "finding": pa.array([True, None]),
            "embedding": pa.array([[1.0, 2.0], [3.0]]),
        }
    )
    pq.write_table(table, tmp_path / "data.parquet")
    manifest = read_manifest(tmp_path / "data.parquet", labels="label")
    assert manifest.sample_ids == ["7", "10"]
    assert column(manifest, "label") == [0, -1]
    assert column(manifest, "group") == ["3", None]
    assert column(manifest, "age") == [30.5, None]
    assert column(manifest, "frame") == [0, None]
    flagged = read_manifest(tmp_path / "data.parquet", labels=["finding"], task="multilabel")
    assert str(column(flagged, "label")) == "[[1.0], [nan]]"
    assert column(manifest, "embedding") == [[1.0, 2.0], [3.0]]


def test_a_file_without_rows(write, tmp_path):
    manifest = read_manifest(write("path,label,group,split\n"), labels="label")
    assert len(manifest) == 0
    manifest.check_leakage()
    assert len(manifest.with_split({"train": 1.0})) == 0
    pq.write_table(pa.table({"path": pa.array([], pa.string())}), tmp_path / "no.parquet")
    assert len(read_manifest(tmp_path / "no.parquet")) == 0


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfpath,sample_id,note\nx.png,1,a\ny.png,2,b\n",
        b"path,sample_id,note\r\nx.png,1,a\r\ny.png,2,b\r\n",
        b"path\tsample_id\tnote\nx.png\t1\ta\ny.png\t2\tb",
        b"path;sample_id;note\nx.png;1;a\n\ny.png;2;b\n",
        b",path,sample_id,note\n0,x.png,1,a\n1,y.png,2,b\n",
        b'path,sample_id,note,\n"x.png",1,a,\n"y.png","2","b",\n',
    ],
    ids=["bom", "crlf", "tabs", "semicolons", "index of pandas", "trailing comma"],
)
def test_dialects(write, content):
    manifest = read_manifest(write(content))
    assert manifest.table.column_names == ["sample_id", "path", "note"]
    assert manifest.sample_ids == ["1", "2"]
    assert column(manifest, "path") == ["x.png", "y.png"]
    assert column(manifest, "note") == ["a", "b"]


def test_gzip(tmp_path):
    import gzip

    (tmp_path / "data.csv.gz").write_bytes(gzip.compress(b"path\nx.png\n"))
    assert column(read_manifest(tmp_path / "data.csv.gz"), "path") == ["x.png"]


def test_fields_are_text_whatever_is_in_them(write):
    odd = [
        "=cmd|'/C calc'!A0",
        "<script>alert(1)</script>",
        'two\nlines, a "quote"',
        "nul\0byte",
        "ü",
    ]
    rows = "".join(f'{i}.png,{i},"{v.replace(chr(34), chr(34) * 2)}"\n' for i, v in enumerate(odd))
    manifest = read_manifest(write("path,sample_id,note\n" + rows))
    assert column(manifest, "note") == odd
    ids = "".join(f'{i}.png,"{v.replace(chr(34), chr(34) * 2)}"\n' for i, v in enumerate(odd[:3]))
    assert read_manifest(write("path,sample_id\n" + ids)).sample_ids == odd[:3]


def test_cells_of_ten_megabytes(write):
    big = "=<b>" + "x" * 10_000_000
    source = write(f"path,sample_id,note,label\na.png,1,{big},n\nb.png,2,short,{big}\n")
    manifest = read_manifest(source, labels="label")
    assert column(manifest, "note") == [big, "short"]
    assert manifest.sample_ids == ["1", "2"]
    with pytest.raises(FastpieError, match="among the classes") as caught:
        read_manifest(source, labels="label", class_names=["n"])
    assert len(str(caught.value)) < 2000
    ids = write(f"path,sample_id\na.png,{big}\nb.png,{big}\n")
    with pytest.raises(FastpieError, match="unique") as caught:
        read_manifest(ids)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,name\na.png,x\nb.png,M\xfcller\n", r"line 3 is in another encoding .*Müller"),
        (b"path,na\xefve\na.png,x\n", "line 1 is in another encoding"),
        ("path,label\na.png,1\n".encode("utf-16"), "in UTF-8"),
        (b"path,label\na.png\nb.png,1\n", r"Row #2"),
        (b"path,label,label\na.png,1,2\n", r"distinct names .*\['label'\]"),
        (b"", "is empty"),
        (b"path,sample_id\na.png,1\nb.png,\nc.png,\n", r"row 2 is empty \(2 in all\)"),
        (b"path,sample_id\na.png,1\nb.png,1\0\n", r"row 2 holds a NUL"),
        (b'path,note\na.png,"5"\nb.png,"open\nc.png,\n', r"row 2\) takes all the rest .*'open"),
        (
            b"path,sample_id\na.png,x\nb.png,y\nc.png,x\nd.png,y\ne.png,x\nf.png,z\n",
            r"2 occur more than once, for example 'x' \(3 times\), 'y' \(2 times\)",
        ),
    ],
)
def test_what_cannot_be_read_says_why(write, content, message):
    with pytest.raises(FastpieError, match=message):
        read_manifest(write(content))


def test_unknown_classes_are_named(write):
    source = write("path,label\na.png,edema\nb.png,<i>mass</i>\nc.png,\n")
    with pytest.raises(FastpieError, match=r"1 others: \['<i>mass</i>'\]"):
        read_manifest(source, labels="label", class_names=["edema"])


def test_no_label_columns(write):
    with pytest.raises(FastpieError, match="name a column"):
        read_manifest(write("path\nx.png\n"), labels=[], task="multilabel")


def test_a_quotation_mark_within_a_field_is_none(write):
    manifest = read_manifest(write('path,note\na.png,5" wide\nb.png,"two\nlines"\n'))
    assert column(manifest, "note") == ['5" wide', "two\nlines"]


def test_a_parquet_file_that_is_none(write):
    with pytest.raises(FastpieError, match="Parquet manifest"):
        read_manifest(write("path\nx.png\n", "data.parquet"))


def test_rows_are_found_again_in_a_large_file(write):
    n = 300_000  # several blocks of the CSV reader
    rows = "".join(f"images/{i:06d}.png,{i % 3},g{i // 7}\n" for i in range(n))
    manifest = read_manifest(write("path,label,group\n" + rows), labels="label")
    assert manifest.table.column("sample_id").num_chunks == 1
    assert manifest.sample_ids.array.buffers()[2].address == (
        manifest.table.column("path").chunk(0).buffers()[2].address
    )
    assert manifest.sample_ids[123_456] == "images/123456.png"
    assert (manifest.table.column("label").to_numpy() == np.arange(n) % 3).all()
    assert manifest.table.column("group")[299_999].as_py() == "g42857"
    with pytest.raises(FastpieError, match=r"images/000007\.png' \(2 times\)"):
        read_manifest(write("path,label,group\n" + rows + "images/000007.png,1,\n"))


def test_a_column_called_label_that_nobody_asked_for(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "data.csv").write_text("path,label\na.png,cat\n")
    data = ManifestDataset(tmp_path / "data.csv")
    image, label, sample_id = data[0]
    assert (image.shape, label, sample_id) == ((3, 4, 4), None, "a.png")
    assert data.labels is None
    assert data.manifest.table["label"].to_pylist() == ["cat"]
