# Everything a newcomer needs on a fresh Debian: `make demo` to see it, `make test` to check it, `make install` to
# have it. Each target does its own set-up; run them as root.

PYTHON ?= /usr/bin/python3
PREFIX ?= /usr/local
LIBRARY = $(PREFIX)/lib/calicoctl
UNIT = $(PREFIX)/lib/systemd/system/calico-node.service
MAN = $(PREFIX)/share/man/man1/calicoctl.1
BASH_COMPLETION = $(PREFIX)/share/bash-completion/completions/calicoctl
ZSH_COMPLETION = $(PREFIX)/share/zsh/site-functions/_calicoctl
VENV = .venv

# what must be there, as demo/packages takes it: COMMAND:PACKAGE, or a package
RUN = python3-venv nft:nftables iptables:iptables
DEMO = $(RUN) ip:iproute2 ping:iputils-ping etcd:etcd-server etcdctl:etcd-client docker:docker-cli,docker.io busybox:busybox-static
TEST = $(DEMO) dockerd:docker.io conntrack:conntrack openssl:openssl sysctl:procps curl:curl man:man-db zsh:zsh
BENCH = $(TEST) containernetworking-plugins

.PHONY: help packages lint types docs unit system installed test soak tox bench demo demo-clean install uninstall clean

help:
	@echo 'make demo         run the four lines of the README for real; make demo-clean removes all of it'
	@echo 'make test         lint, types, unit and system tests'
	@echo 'make unit         unit tests alone (no root needed once $(VENV) is there)'
	@echo 'make system       system tests alone; ARGS="-k name" chooses'
	@echo 'make docs         write the pages of the commands and the man page anew'
	@echo 'make tox          unit tests on Python 3.9 to 3.13'
	@echo 'make soak         five minutes of restarts, removals and crashes at random'
	@echo 'make bench        speed, as ratios'
	@echo 'make install      calicoctl in a virtual environment of its own, on the path, and a systemd unit that is not'
	@echo '                  enabled; make uninstall removes them'

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

# two hosts at a time: most of the time, tests wait
system: $(VENV)/ready | packages
	$(VENV)/bin/pytest --tx '2*popen//python=tests/sandboxed-python' --dist loadfile tests/system $(ARGS)

# what `make install` does, in a place of its own, and taken away again
installed: packages
	@place=$$(mktemp -d) && trap 'rm -rf "$$place"' EXIT && \
	$(MAKE) --no-print-directory install PREFIX="$$place" && cd / && \
	"$$place/bin/calicoctl" container --help | grep 'container add' && \
	man -l "$$place/share/man/man1/calicoctl.1" | grep -q 'calicoctl container add' && \
	bash -c ". $$place/share/bash-completion/completions/calicoctl && complete -p calicoctl" && \
	grep -q '^#compdef calicoctl' "$$place/share/zsh/site-functions/_calicoctl" && \
	grep "^ExecStart=$$place/bin/calicoctl node --detach=false" "$$place/lib/systemd/system/calico-node.service" && \
	$(MAKE) --no-print-directory -C "$(CURDIR)" uninstall PREFIX="$$place" && test -z "$$(find "$$place" -type f)"

test: lint types unit installed system

# interpreters are found on the path and, where there is a pyenv, among its versions
PYENV_BINS = $(wildcard $(HOME)/.pyenv/versions/3.*/bin)
empty =
space = $(empty) $(empty)

tox: $(VENV)/ready
	$(VENV)/bin/pip install --quiet tox
	PATH="$(subst $(space),:,$(PYENV_BINS)):$$PATH" $(VENV)/bin/tox

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

install:
	@demo/packages $(RUN)
	$(PYTHON) -m venv --clear $(LIBRARY)
	$(LIBRARY)/bin/pip install --quiet .
	mkdir -p $(PREFIX)/bin
	ln -sf $(LIBRARY)/bin/calicoctl $(PREFIX)/bin/calicoctl
	mkdir -p $(PREFIX)/lib/systemd/system
	sed 's,@PREFIX@,$(PREFIX),' systemd/calico-node.service.in >$(UNIT)
	install -D -m 644 docs/calicoctl.1 $(MAN)
	mkdir -p $(dir $(BASH_COMPLETION)) $(dir $(ZSH_COMPLETION))
	$(PREFIX)/bin/calicoctl completion bash >$(BASH_COMPLETION)
	$(PREFIX)/bin/calicoctl completion zsh >$(ZSH_COMPLETION)
	$(PREFIX)/bin/calicoctl version

uninstall:
	rm -rf $(LIBRARY) $(PREFIX)/bin/calicoctl $(UNIT) $(MAN) $(BASH_COMPLETION) $(ZSH_COMPLETION)

clean:
	rm -rf $(VENV) build .tox *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
