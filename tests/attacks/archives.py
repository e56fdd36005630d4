"""Zip archives and arrays that claim more than they hold, lead out of their folder or carry pickles, as bytes."""

import io
import pickle
import struct
import zipfile
import zlib


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def bomb(member: str, size: int = 2**31) -> bytes:
    """A zip of 2 MB whose one member unpacks to ``size`` zero bytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(b"\0" * 2**20) + packer.flush(zlib.Z_FULL_FLUSH)  # stands alone, so it may be repeated
    data, name, crc = block * (size // 2**20) + packer.flush(), member.encode(), 0  # nobody should get as far as the CRC
    common = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, crc, len(data), size, len(name), 0)
    local = b"PK\3\4" + common + name + data
    central = b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + end


def npy(header: str, data: bytes = b"") -> bytes:
    """A .npy with this header text, true or not."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


def png(width: int, height: int) -> bytes:
    """A PNG that claims this size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


PICKLED = npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps([1]))
SHAPE_2_40 = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }", b"\0" * 16)
SHAPE_WRAPS = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }")
SHAPE_NEGATIVE = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }", b"\0" * 16)
HEADER_CODE = npy("__import__('os').system('false')")
HEADER_DEEP = npy("(" * 5000 + ")" * 5000)

#: name -> maker of the file
FILES = {
    "bomb.npz": lambda: bomb("x.npy"),
    "bomb_images.zip": lambda: bomb("cat/1.png"),
    "bomb.pt": lambda: bomb("archive/data.pkl"),
    "pickled.npz": lambda: zip_of({"x.npy": PICKLED}),
    "pickled.npy": lambda: PICKLED,
    "shape_2_40.npz": lambda: zip_of({"x.npy": SHAPE_2_40}),
    "shape_2_40.npy": lambda: SHAPE_2_40,
    "shape_wraps.npy": lambda: SHAPE_WRAPS,
    "shape_negative.npy": lambda: SHAPE_NEGATIVE,
    "header_code.npy": lambda: HEADER_CODE,
    "header_deep.npy": lambda: HEADER_DEEP,
    "traversal.zip": lambda: zip_of({"../../cat/1.png": png(1, 1)}),
    "absolute.zip": lambda: zip_of({"/etc/cat/1.png": png(1, 1)}),
    "pixels_2_32.zip": lambda: zip_of({"cat/1.png": png(65535, 65535)}),
    "pixels_81_million.zip": lambda: zip_of({"cat/1.png": png(9000, 9000)}),
    "postscript.zip": lambda: zip_of({"cat/1.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}),
    "no_zip.npz": lambda: b"PK\3\4" + b"\0" * 100,
    "empty.npz": lambda: b"",
    "deep.json": lambda: b"[" * 100_000,
    "huge_id.json": lambda: b"[[99999999999999999999]]",
    "text.json": lambda: b'[["a"]]',
}
