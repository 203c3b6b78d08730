"""Files of a stranger: small on the disk, and far larger in the memory of whoever believes them."""

import io
import resource
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numbered_images import encoded
from PIL import Image

MANY = 3 * 10**8  # bytes that a bomb unpacks to
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@contextmanager
def memory_for(more: int) -> Iterator[None]:
    """No more than so many bytes than now can be taken: a MemoryError says who tries."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def saved(image: Image.Image, format: str) -> bytes:
    image.save(file := io.BytesIO(), format)
    return file.getvalue()


def claiming(width: int, height: int, format: str) -> bytes:
    """A picture of 64 x 64 pixels that claims another size in its header."""
    data = bytearray(saved(Image.new("RGB", (64, 64), (200, 9, 9)), format))
    if format == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", height, width)
    elif format == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif format == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    else:
        assert format == "BMP"
        data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def write_rows(folder: Path, images: list[dict | None], **options) -> Path:
    """A parquet file with these images, whose schema does not say that they are images."""
    folder.mkdir(exist_ok=True)
    labels = np.arange(len(images)) % 2
    pq.write_table(pa.table({"image": pa.array(images, IMAGE), "label": labels}), folder / "train.parquet", **options)
    return folder


def null_rows(folder: Path) -> Path:
    """Some kilobytes of parquet with two million rows of nothing."""
    count = 2_000_000
    folder.mkdir()
    rows = {"image": pa.nulls(count, IMAGE), "label": pa.array(np.zeros(count, np.int64))}
    pq.write_table(pa.table(rows), folder / "train.parquet")
    return folder


def packed_row(folder: Path) -> Path:
    """Some kilobytes of parquet with an image of 300 MB of zeros."""
    return write_rows(folder, [{"bytes": bytes(MANY), "path": "a"}], compression="zstd", use_dictionary=False)


@contextmanager
def _tar(path: Path, mode: str = "w") -> Iterator[tarfile.TarFile]:
    path.parent.mkdir()
    with tarfile.open(path, mode) as tar:
        for i in range(6):
            add(tar, f"{i}.png", encoded(i))
            add(tar, f"{i}.cls", str(i % 2).encode())
        yield tar


def add(tar: tarfile.TarFile, name: str, content: bytes, **pax_headers: str) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.pax_headers = len(content), pax_headers
    tar.addfile(member, io.BytesIO(content))


def compressed_tar(folder: Path) -> Path:
    with _tar(folder / "train.tar", "w:gz") as tar:
        add(tar, "9.png", bytes(2**20))
    return folder


def compressed_member(folder: Path) -> Path:
    deflate = zlib.compressobj(wbits=31)
    with _tar(folder / "train.tar") as tar:
        add(tar, "9.png.gz", deflate.compress(bytes(MANY)) + deflate.flush())
    return folder


def sparse_member(folder: Path) -> Path:
    """A member that is a hole of 300 MB."""
    hole = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(MANY)}
    with _tar(folder / "train.tar") as tar:
        add(tar, "9.png", b"0\n".ljust(512, b"\0"), **hole, **{"GNU.sparse.name": "9.png"})
    return folder


DATASETS = {
    "claims 2,000,000 rows": null_rows,
    "unpacks to": packed_row,
    "without compression": compressed_tar,
    r"packed member, 9\.png\.gz": compressed_member,
    r"packed member, 9\.png:": sparse_member,
}
