# `make demo` shows it, `make test` tests it, `make install` installs it. Each target does its own set-up, also on a
# fresh Debian; run them as root.

PYTHON ?= /usr/bin/python3
PREFIX ?= /usr/local
DESTDIR ?=
CNI_BIN ?= /opt/cni/bin
VENV = .venv

# what each target needs, in the syntax of demo/packages: COMMAND:PACKAGE, or a package
RUN = python3-venv nft:nftables iptables:iptables ip:iproute2
BGP = bird:bird2
DEMO = $(RUN) ping:iputils-ping etcd:etcd-server etcdctl:etcd-client docker:docker-cli,docker.io busybox:busybox-static
DEMO_HOSTS = $(RUN) $(BGP) ping:iputils-ping etcd:etcd-server etcdctl:etcd-client
TEST = $(DEMO) $(BGP) dockerd:docker.io conntrack:conntrack openssl:openssl sysctl:procps curl:curl jq:jq man:man-db zsh:zsh systemd-analyze:systemd ctr:containerd python3-yaml
# what tests use that do not run on the other releases
TEST_HERE = podman:podman docker-compose:docker-compose containernetworking-plugins chromium:chromium lintian:lintian ansible-playbook:ansible-core
BENCH = $(TEST) $(TEST_HERE)

# other releases of Debian and Ubuntu, by code name, and what `make` runs there
RELEASES ?= trixie noble
ON_RELEASES ?= $(TESTS_$(release)) TEST_HERE= FILES='$(FILES_$(release))' ARGS='$(LEFT_OUT_$(release):%=--ignore=tests/system/test_%.py)'

# the Pythons are 3.13 and 3.12
TESTS_trixie = unit system
TESTS_noble = system

# which of etcd's APIs the system tests use there, as on this host (TESTED_API): trixie has etcd 3.5, noble 3.4
API_trixie = etcdv3
API_noble = etcdv2

# on which of them each command runs in a process of its own, without the command server
COLD_noble = yes

# On trixie, which is for etcd 3.5 and for the newest kernel tools and Python, the tests of what depends on these. On noble,
# which is for etcd's v2 API and for commands without their server, all but those of that server, of the local etcd, the
# documentation and the demo, which always use v3, of Docker's hook, which that engine's way to keep images does not allow,
# of memory usage and endurance, which no other release can change, and what needs TEST_HERE.
FILES_trixie = checksystem command_server datastore_watch deb drops etcd3 etcd_apis guard neighbours netns \
	packages policy ruleset store_contract
LEFT_OUT_noble = command_server settings_file docs demo docker_hook memory_usage soak cni_podman compose map ansible

.PHONY: help packages lint types docs docs-picture unit system test test-all releases soak lock tox bench demo demo-clean demo-hosts demo-hosts-clean wheel deb install uninstall install-cni uninstall-cni clean

help:
	@echo 'make demo         connect three containers for real; make demo-clean removes everything'
	@echo 'make demo-hosts   the same for five workloads on three hosts, which are network namespaces; make demo-hosts-clean'
	@echo '                  removes everything'
	@echo 'make test         lint, types, unit and system tests'
	@echo 'make test-all     the same, other Pythons and releases, and the soak test: what CI runs'
	@echo 'make unit         unit tests (no root needed once $(VENV) and BIRD exist)'
	@echo 'make system       system tests; FILES="policy drops" or ARGS="-k name" selects, TESTED_API=etcdv2 runs them'
	@echo '                  through etcd'"'s v2 API"', TESTED_COLD=yes without the command server'
	@echo 'make docs         generate the pages of the commands and the man page'
	@echo 'make docs-picture make the picture of a map again'
	@echo 'make lock         pin the newest versions of the libraries that make install installs, by their hashes'
	@echo 'make tox          unit tests on Python 3.9 to 3.13; TOXENV=py39 selects'
	@echo 'make releases     unit tests and some system tests on Debian 13, system tests on Ubuntu 24.04 through etcd'"'s"
	@echo '                  v2 API; RELEASES=trixie selects, ON_RELEASES=test runs make test there'
	@echo 'make soak         five minutes of random restarts, removals and crashes'
	@echo 'make bench        benchmarks, as ratios'
	@echo 'make wheel        a wheel of calicoctl, without its libraries, in dist'
	@echo 'make deb          a package in dist, for Debian 12 and 13 and Ubuntu 24.04'
	@echo 'make install      install or upgrade calicoctl, in a virtual environment of its own, with a systemd unit that is'
	@echo '                  not enabled; make uninstall removes it'
	@echo 'make install-cni  install the CNI plugin calico, for podman, containerd and others; make uninstall-cni removes it'

# everything that the tests use
packages:
	@demo/packages $(TEST) $(TEST_HERE)

$(VENV)/ready: setup.py pyproject.toml
	@demo/packages $(RUN)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[test,lint]'
	touch $@

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/ready
	$(VENV)/bin/mypy

# the pages of the commands, and the man page, from the help texts and three tables of docs/reference.md
docs: $(VENV)/ready
	$(VENV)/bin/python docs/generate.py

# docs/map.png, the picture of a map in README.md
docs-picture: $(VENV)/ready
	@demo/packages chromium:chromium
	$(VENV)/bin/python -m docs.picture

# the tests give BIRD the configuration that we write for it
unit: $(VENV)/ready
	@demo/packages $(BGP)
	$(VENV)/bin/pytest -n 2 tests/unit $(ARGS)

# no more hosts at a time than cores: tests have deadlines
system: $(VENV)/ready $(VENV)/wheels/ready | packages
	$(VENV)/bin/pytest --tx '2*popen//python=tests/sandboxed-python' --dist loadfile --durations=20 $(or $(FILES:%=tests/system/test_%.py),tests/system) $(ARGS)

# for the test of `make install`, on a host without a network: what it installs, as it was published
$(VENV)/wheels/ready: setup/requirements.txt setup/build-requirements.txt | $(VENV)/ready
	rm -rf $(VENV)/wheels
	$(VENV)/bin/pip download --quiet --require-hashes --dest $(VENV)/wheels $(foreach file,$(filter %.txt,$^),-r $(file))
	touch $@

# what `make install` installs: the newest versions that setup.py allows, for all Pythons, with the hashes of all files
LOCK = $(VENV)/bin/uv pip compile --quiet --universal --upgrade --python-version 3.9 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command 'make lock'
lock: $(VENV)/ready
	$(VENV)/bin/pip install --quiet uv
	$(LOCK) setup.py --output-file setup/requirements.txt
	printf 'setuptools>=61\nwheel\n' | $(LOCK) - --output-file setup/build-requirements.txt

test: lint types unit system

# the unit tests run on 3.11 here and on 3.13 in trixie, and the system tests on 3.12 in noble
test-all: test
	TOXENV=py39 $(MAKE) tox
	SOAK_SECONDS=120 $(MAKE) releases soak

# each in a root of its own in build/releases, which is kept
releases:
	@demo/packages mmdebstrap:mmdebstrap distro-info-data git:git
	@$(foreach release,$(RELEASES),echo "On $(release):" && \
		MAKEFLAGS= CI= TESTED_API=$(or $(API_$(release)),etcdv3) TESTED_COLD=$(COLD_$(release)) tests/release $(release) make $(ON_RELEASES) &&) true

# interpreters come from the path and from pyenv, if there is one
PYENV_BINS = $(wildcard $(HOME)/.pyenv/versions/3.*/bin)
empty =
space = $(empty) $(empty)

tox: $(VENV)/ready
	@demo/packages $(BGP)
	$(VENV)/bin/pip install --quiet tox
	PATH="$(subst $(space),:,$(PYENV_BINS)):$$PATH" $(VENV)/bin/tox run

bench: $(VENV)/ready
	@demo/packages $(BENCH)
	tests/sandbox $(VENV)/bin/python bench/bench.py $(ARGS)
	tests/sandbox $(VENV)/bin/python bench/stores.py $(ARGS)
	tests/sandbox $(VENV)/bin/python bench/agent.py $(ARGS)
	tests/sandbox $(VENV)/bin/python bench/connections.py $(ARGS)
	tests/sandbox $(VENV)/bin/python bench/drops.py $(ARGS)
	tests/sandbox $(VENV)/bin/python bench/restart.py $(ARGS)
	tests/sandbox $(VENV)/bin/python bench/docker_ways.py $(ARGS)
	tests/sandbox $(VENV)/bin/python bench/warm.py $(ARGS)
	tests/sandbox $(VENV)/bin/python bench/hosts.py $(ARGS)
	tests/sandbox $(VENV)/bin/python bench/map.py
	tests/sandbox $(VENV)/bin/python bench/configuration.py $(ARGS)

# `make test` runs a short form
SOAK_SECONDS ?= 300
soak: $(VENV)/ready | packages
	SOAK_SECONDS=$(SOAK_SECONDS) SOAK_CONTAINERS=20 tests/sandbox $(VENV)/bin/pytest -s tests/system/test_soak.py $(ARGS)

# a running engine is used, whoever made it
demo: $(VENV)/ready
	@demo/packages $(DEMO) $$(docker info >/dev/null 2>&1 || echo dockerd:docker.io)
	demo/demo

demo-clean:
	demo/clean

demo-hosts: $(VENV)/ready
	@demo/packages $(DEMO_HOSTS)
	demo/hosts

demo-hosts-clean:
	demo/hosts-clean

wheel:
	@demo/packages python3-venv
	@PYTHON="$(PYTHON)" setup/calicoctl wheel

deb:
	@demo/packages python3-venv python3-yaml
	@PYTHON="$(PYTHON)" setup/deb

# with DESTDIR, for packagers, nothing else on this host is changed
install:
	@[ -n "$(DESTDIR)" ] || demo/packages $(RUN)
	@[ -n "$(DESTDIR)" ] || demo/packages $(BGP) || \
		echo 'Continuing without BIRD 2: this host will exchange no routes with other hosts until it is installed.' >&2
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" PYTHON="$(PYTHON)" setup/calicoctl install

# a CNI plugin that runs the installed calicoctl, for podman, containerd and others
install-cni:
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" CNI_BIN="$(CNI_BIN)" setup/calicoctl install-cni

uninstall-cni:
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" CNI_BIN="$(CNI_BIN)" setup/calicoctl uninstall-cni

uninstall:
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" CNI_BIN="$(CNI_BIN)" setup/calicoctl uninstall

clean:
	rm -rf $(VENV) build dist .tox *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
