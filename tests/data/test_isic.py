"""ISIC 2018 task 3 and HAM10000."""

import pytest

from fastpie import FastpieError
from fastpie.data import read_manifest

CLASSES = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]


def truth(path, rows):
    lines = [
        f"{image}," + ",".join("1.0" if c == name else "0.0" for c in CLASSES)
        for image, name in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([f"image,{','.join(CLASSES)}", *lines]) + "\n")
    return path


@pytest.fixture
def isic(tmp_path):
    training = [("ISIC_0024306", "NV"), ("ISIC_0024307", "NV"), ("ISIC_0024310", "MEL")]
    for part, rows in (
        ("Training", training),
        ("Validation", [("ISIC_0034321", "BCC")]),
        ("Test", [("ISIC_0034524", "VASC")]),
    ):
        name = f"ISIC2018_Task3_{part}"
        truth(tmp_path / f"{name}_GroundTruth/{name}_GroundTruth.csv", rows)
        for image, _ in rows:
            file = tmp_path / f"{name}_Input/{image}.jpg"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"jpeg")
    (tmp_path / "ISIC2018_Task3_Training_LesionGroupings.csv").write_text(
        "image,lesion_id,diagnosis_confirm_type\n"
        "ISIC_0024306,HAM_0000550,serial imaging showing no change\n"
        "ISIC_0024310,HAM_0003577,histopathology\n"
        "ISIC_0024307,HAM_0000550,single image expert consensus\n"
    )
    return tmp_path


def test_the_folder_of_the_challenge(isic):
    manifest = read_manifest(isic)
    assert (manifest.task, manifest.class_names) == ("multiclass", CLASSES)
    table = {r["sample_id"]: r for r in manifest.table.to_pylist()}
    assert {i: (r["label"], r["group"], r["split"]) for i, r in table.items()} == {
        "ISIC_0024306": (1, "HAM_0000550", "train"),
        "ISIC_0024307": (1, "HAM_0000550", "train"),
        "ISIC_0024310": (0, "HAM_0003577", "train"),
        "ISIC_0034321": (2, None, "val"),
        "ISIC_0034524": (6, None, "test"),
    }
    assert table["ISIC_0034524"]["path"] == "ISIC2018_Task3_Test_Input/ISIC_0034524.jpg"
    assert all(manifest.files.open(r["path"]).is_file() for r in table.values())


def test_one_ground_truth(isic):
    source = isic / "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv"
    manifest = read_manifest(source, root=isic, class_names=CLASSES[::-1])
    assert manifest.table["label"].to_pylist() == [5, 5, 6]
    assert manifest.table["group"].to_pylist() == ["HAM_0000550"] * 2 + ["HAM_0003577"]
    groupings = isic / "ISIC2018_Task3_Training_LesionGroupings.csv"
    moved = groupings.rename(isic / "elsewhere.csv")
    with pytest.raises(FastpieError, match="LesionGroupings"):
        read_manifest(source)
    assert read_manifest(source, groups=moved).table["group"][0].as_py() == "HAM_0000550"
    test = isic / "ISIC2018_Task3_Test_GroundTruth/ISIC2018_Task3_Test_GroundTruth.csv"
    assert "group" not in read_manifest(test).table.column_names  # none were ever handed out


HAM = """lesion_id,image_id,dx,dx_type,age,sex,localization,dataset
HAM_0000118,ISIC_0027419,bkl,histo,80.0,male,scalp,vidir_modern
HAM_0000118,ISIC_0025030,bkl,histo,80.0,male,scalp,vidir_modern
HAM_0002730,ISIC_0026769,nv,follow_up,,unknown,unknown,rosendahl
HAM_0001466,ISIC_0031633,akiec,histo,75.0,female,lower extremity,rosendahl
"""


@pytest.mark.parametrize("kind", ["csv", "tab", "no extension", "seven columns"])
def test_ham10000(tmp_path, kind):
    text = HAM
    if kind == "tab":  # as Dataverse writes it
        text = "".join(
            "\t".join(
                c if i == 4 and c != "age" else f'"{c}"' for i, c in enumerate(line.split(","))
            )
            + "\n"
            for line in HAM.splitlines()
        )
    if kind == "seven columns":
        text = "".join(line.rpartition(",")[0] + "\n" for line in HAM.splitlines())
    names = {"tab": "HAM10000_metadata.tab", "no extension": "HAM10000_metadata"}
    source = tmp_path / names.get(kind, "HAM10000_metadata.csv")
    source.write_text(text)
    for part, image in ((1, "ISIC_0027419"), (2, "ISIC_0026769")):
        file = tmp_path / f"HAM10000_images_part_{part}/{image}.jpg"
        file.parent.mkdir()
        file.write_bytes(b"jpeg")
    (tmp_path / "HAM10000_segmentations").mkdir()
    (tmp_path / "HAM10000_segmentations/ISIC_0027419_segmentation.png").write_bytes(b"png")
    for given in (source, tmp_path):
        manifest = read_manifest(given)
        table = manifest.table.to_pydict()
        assert manifest.class_names == CLASSES
        assert table["label"] == [4, 4, 1, 3]
        assert table["group"] == ["HAM_0000118"] * 2 + ["HAM_0002730", "HAM_0001466"]
        assert table["age"] == [80, 80, None, 75]
        assert table["sex"] == ["M", "M", None, "F"]
        assert table["site"] == ["scalp", "scalp", None, "lower extremity"]
        assert table["path"] == [
            "HAM10000_images_part_1/ISIC_0027419.jpg",
            "ISIC_0025030.jpg",  # not there
            "HAM10000_images_part_2/ISIC_0026769.jpg",
            "ISIC_0031633.jpg",
        ]
    manifest.with_split({"train": 0.5, "test": 0.5}).check_leakage()


def test_an_unknown_diagnosis(tmp_path):
    (tmp_path / "HAM10000_metadata.csv").write_text(HAM.replace("akiec", "scc"))
    with pytest.raises(FastpieError, match="SCC"):
        read_manifest(tmp_path / "HAM10000_metadata.csv")
