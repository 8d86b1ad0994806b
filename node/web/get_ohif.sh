#!/bin/sh
# Brings OHIF, the web viewer, as its makers build it, into a new folder: sh get_ohif.sh FOLDER. For `make viewer` and the
# image. Needs npm and tar. Left out is ort/, two thirds of it: a runtime for tools that we do not use.
set -eu

version=3.13.2
sha256=b189d3963bfc58e9394a9db8c7be75d07beb029ec211dbb126d47b62969dd3f1 # of the package on the npm registry

folder=$1
package=ohif-app-$version.tgz
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && npm pack --silent "@ohif/app@$version" >/dev/null)
if command -v sha256sum >/dev/null; then found=$(sha256sum "$work/$package"); else found=$(shasum -a 256 "$work/$package"); fi
if [ "${found%% *}" != "$sha256" ]; then
    echo "$package from the npm registry has the sha256 ${found%% *}, and not $sha256 as here: it was exchanged or damaged." \
        "Nothing was installed; try again, and if it stays so, ask why before you change the number in $0." >&2
    exit 1
fi
rm -rf "$folder"
mkdir "$folder"
tar --extract --gzip --file "$work/$package" --directory "$folder" --strip-components=2 --exclude='package/dist/ort' package/dist
