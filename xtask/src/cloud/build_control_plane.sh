#!/usr/bin/env bash
# Builds kube-apiserver, kube-controller-manager and kube-scheduler 1.20.2 into FOLDER/bin, for tests only.
#
#   build_control_plane.sh FOLDER
#
# Nobody packages these programs, but Debian 12 has their source, and a Go that builds them. About ten CPU
# minutes; 3 GB below FOLDER, which are given back. Root, because it installs Debian's packages.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
programs=(kube-apiserver kube-controller-manager kube-scheduler)
export DEBIAN_FRONTEND=noninteractive

apt-get update -q
apt-get install -y -q --no-install-recommends etcd-server golang-1.19-go golang-github-modern-go-reflect2-dev rsync jq make

# The machine's own list of packages, read as a list of sources, in a state of its own.
build=$folder/build
rm -rf "$build"
mkdir -p "$build/lists/partial" "$build/archives/partial" "$build/tree" "$build/home"
awk '/^Types: deb$/ { print "Types: deb-src" } /^(URIs|Suites|Components|Signed-By):/ || /^$/' \
  /etc/apt/sources.list.d/debian.sources >"$build/debian.sources"
options=(-q -o Dir::Etc::sourcelist="$build/debian.sources" -o Dir::Etc::sourceparts=/dev/null
  -o Dir::State::lists="$build/lists" -o Dir::Cache::archives="$build/archives" -o APT::Sandbox::User=root)
apt-get "${options[@]}" update
(cd "$build" && apt-get "${options[@]}" source --download-only kubernetes)
tar -xzf "$build"/kubernetes_*.orig.tar.gz -C "$build/tree" --strip-components=1

# Its copy of reflect2 does not know this Go, and every POST would panic: Debian's own does.
reflect=$build/tree/vendor/github.com/modern-go/reflect2
rm -f "$reflect"/*
cp /usr/share/gocode/src/github.com/modern-go/reflect2/*.{go,s} "$reflect/"
rm -f "$reflect"/*_test.go

# A tree without git history, in the place of a workspace where its makefiles look for it.
mkdir -p "$build/tree/.go/src/k8s.io"
ln -sfn ../../.. "$build/tree/.go/src/k8s.io/kubernetes"
env -u GOFLAGS -C "$build/tree" HOME="$build/home" GOPATH="$build/tree/.go" GOCACHE="$build/go" CGO_ENABLED=0 GOTOOLCHAIN=local \
  PATH="/usr/lib/go-1.19/bin:$PATH" KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_COMMIT=debian KUBE_GIT_TREE_STATE=archive \
  make WHAT="${programs[*]/#/cmd/}"

mkdir -p "$folder/bin"
for program in "${programs[@]}"; do
  mv "$build/tree/_output/bin/$program" "$folder/bin/$program"
  "$folder/bin/$program" --version
done
rm -rf "$build"
