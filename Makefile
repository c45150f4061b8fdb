# Everything a newcomer needs on a fresh Debian: `make demo` to see it, `make test` to check it, `make install` to
# have it. Each target does its own set-up; run them as root.

PYTHON ?= /usr/bin/python3
PREFIX ?= /usr/local
DESTDIR ?=
VENV = .venv

# what must be there, as demo/packages takes it: COMMAND:PACKAGE, or a package
RUN = python3-venv nft:nftables iptables:iptables ip:iproute2
DEMO = $(RUN) ping:iputils-ping etcd:etcd-server etcdctl:etcd-client docker:docker-cli,docker.io busybox:busybox-static
TEST = $(DEMO) dockerd:docker.io conntrack:conntrack openssl:openssl sysctl:procps curl:curl man:man-db zsh:zsh
BENCH = $(TEST) containernetworking-plugins

# other releases of Debian and Ubuntu, by their code names, and what `make` is called with there: without the tests of
# what cannot differ from release to release, a failure at each step of a command, many at once, memory, endurance
RELEASES ?= trixie noble
LEFT_OUT = fault_injection concurrency memory_usage soak
ON_RELEASES ?= unit system ARGS='$(LEFT_OUT:%=--ignore=tests/system/test_%.py)'

.PHONY: help packages lint types docs unit system test test-all releases soak tox bench demo demo-clean install uninstall clean

help:
	@echo 'make demo         run the four lines of the README for real; make demo-clean removes all of it'
	@echo 'make test         lint, types, unit and system tests'
	@echo 'make test-all     the same, and what repeats it: other Pythons and releases, and the soak'
	@echo 'make unit         unit tests alone (no root needed once $(VENV) is there)'
	@echo 'make system       system tests alone; ARGS="-k name" chooses'
	@echo 'make docs         write the pages of the commands and the man page anew'
	@echo 'make tox          unit tests on Python 3.9 to 3.13'
	@echo 'make releases     unit and system tests on other releases of Debian and Ubuntu; RELEASES=trixie chooses,'
	@echo '                  ON_RELEASES=test runs all of make test there'
	@echo 'make soak         five minutes of restarts, removals and crashes at random'
	@echo 'make bench        speed, as ratios'
	@echo 'make install      calicoctl in a virtual environment of its own, on the path, and a systemd unit that is not'
	@echo '                  enabled, also over an older one; make uninstall removes them'

# of all that the tests use
packages:
	@demo/packages $(TEST)

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

# the pages of the commands, and the man page, from what --help shows
docs: $(VENV)/ready
	$(VENV)/bin/python docs/generate.py

unit: $(VENV)/ready
	$(VENV)/bin/pytest tests/unit $(ARGS)

# two hosts at a time, for two cores: tests have deadlines
system: $(VENV)/ready $(VENV)/wheels/ready | packages
	$(VENV)/bin/pytest --tx '2*popen//python=tests/sandboxed-python' --dist loadfile tests/system $(ARGS)

# for the test of `make install`, on a host without a network
$(VENV)/wheels/ready: setup.py | $(VENV)/ready
	$(VENV)/bin/pip wheel --quiet --wheel-dir $(VENV)/wheels . 'setuptools>=61' wheel
	rm -rf $(VENV)/wheels/calicoctl-*.whl build/lib build/bdist.*
	touch $@

test: lint types unit system

test-all: test tox releases soak

# each in a root of its own, which stays in build/releases for the next time
releases:
	@demo/packages mmdebstrap:mmdebstrap distro-info-data git:git
	@for release in $(RELEASES); do \
		echo "On $$release:" && MAKEFLAGS= tests/release $$release make $(ON_RELEASES) || exit 1; \
	done

# interpreters are found on the path and, where there is a pyenv, among its versions
PYENV_BINS = $(wildcard $(HOME)/.pyenv/versions/3.*/bin)
empty =
space = $(empty) $(empty)

tox: $(VENV)/ready
	$(VENV)/bin/pip install --quiet tox
	PATH="$(subst $(space),:,$(PYENV_BINS)):$$PATH" $(VENV)/bin/tox run-parallel

bench: $(VENV)/ready
	@demo/packages $(BENCH)
	tests/sandbox $(VENV)/bin/python bench/bench.py $(ARGS)
	tests/sandbox $(VENV)/bin/python bench/agent.py $(ARGS)
	tests/sandbox $(VENV)/bin/python bench/restart.py $(ARGS)

# five minutes of everything that can happen to containers and to what they stand on; `make test` has a short form
soak: $(VENV)/ready | packages
	SOAK_SECONDS=300 SOAK_CONTAINERS=20 tests/sandbox $(VENV)/bin/pytest -s tests/system/test_soak.py $(ARGS)

# an engine that answers is used; it may be another's than Debian's
demo: $(VENV)/ready
	@demo/packages $(DEMO) $$(docker info >/dev/null 2>&1 || echo dockerd:docker.io)
	demo/demo

demo-clean:
	demo/clean

# with DESTDIR, for packages: nothing else of this host is changed
install:
	@[ -n "$(DESTDIR)" ] || demo/packages $(RUN)
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" PYTHON="$(PYTHON)" setup/calicoctl install

uninstall:
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" setup/calicoctl uninstall

clean:
	rm -rf $(VENV) build .tox *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
