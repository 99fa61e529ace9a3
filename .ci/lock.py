"""Write the locks: every package of `make setup` with the hashes of its files. `make lock`.

lock/all.txt is all but torch; lock/cpu.txt the CPU build of torch that pip finds here; lock/cuda.txt PyPI's, and what
it asks for. One file with the hashes of both would always be PyPI's: a file on a disk has no hash until it is read.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CUDA = re.compile(r"(torch==|nvidia|cuda|triton)")
HEAD = "# by `make lock`: pip install --require-hashes -r lock/all.txt -r lock/{torch}.txt, then --no-deps -e ."


def entries(text: str) -> list[str]:
    """The packages of a requirements file, each with its lines of hashes."""
    return re.findall(r"^\S.*(?:\n[ \t]+.*)*", text, re.MULTILINE)


def served(requirement: str) -> str:
    """sha256 of the file that pip takes here."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, requirement]
        subprocess.run(command, check=True)
        (path,) = Path(folder).iterdir()
        return hashlib.sha256(path.read_bytes()).hexdigest()


def main(uv: str) -> None:
    command = [
        uv,
        "pip",
        "compile",
        "-q",
        "pyproject.toml",
        "--extra",
        "test",
        "--extra",
        "fast",
        "-c",
        "constraints.txt",
    ]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--python-version", "3.11", "--universal"]
    found = entries(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    cuda = [entry for entry in found if CUDA.match(entry)]
    torch = next(re.split(r"[ \\;]", entry)[0] for entry in cuda if entry.startswith("torch=="))
    Path("lock").mkdir(exist_ok=True)
    write("all", [entry for entry in found if entry not in cuda], "cpu|cuda")
    write("cpu", [f"{torch} \\\n    --hash=sha256:{served(torch)}"], "cpu")
    write("cuda", cuda, "cuda")


def write(name: str, kept: list[str], torch: str) -> None:
    Path("lock", f"{name}.txt").write_text("\n".join([HEAD.format(torch=torch), *kept, ""]))


if __name__ == "__main__":
    main(*sys.argv[1:])
