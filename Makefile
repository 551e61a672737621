# `make` prints what there is to run. Every target installs first when that is needed.
.DEFAULT_GOAL := help
.PHONY: help .venv demo test test-browser lab figures docs clean force

PYTHON ?=
SCALE ?= cpu
# Each is drawn into outputs/SCALE/; later ones share histories and agents with earlier ones.
ALL_FIGURES = figure3_grid figure3_ant figure4 figure5 figure5_longer figure5_pendulum \
    projection_study long_lifetimes conditioning claims
FIGURES ?= $(ALL_FIGURES)

OUTPUTS := $(if $(GLA_NB_OUTPUTS),$(GLA_NB_OUTPUTS),outputs)
# Refuses parameters that a notebook does not have, and shows how far it is.
NOTEBOOK := .venv/bin/python -m gla_nb.notebooks

# The stamp names the folder it was made in: a checkout that was moved or copied installs again,
# as does one whose interpreter has gone.
ifneq ($(shell { .venv/bin/python -c '' && cat .venv/.installed; } 2>/dev/null),$(CURDIR))
.venv/.installed: force
endif

help:  ## this list
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

.venv: .venv/.installed  ## install into .venv (Python 3.11 or newer; PYTHON=... chooses one)
	@echo "Installed: .venv"

.venv/.installed: settings.ini setup.py constraints.txt
	@.ci/install "$(PYTHON)"

demo: .venv/.installed  ## from nothing to Figure 3 (left) on two CPU cores, in minutes
	$(NOTEBOOK) nbs/10_figure3.ipynb "$(OUTPUTS)/demo/figure3_grid.ipynb" \
	    -p experiment grid -p scale cpu -p controls False -p folder demo
	@echo
	@cat "$(OUTPUTS)/demo/figure3_grid_table.md"
	@echo
	@echo "Figure: $(OUTPUTS)/demo/figure3_grid.png, with the notebook that drew it beside it."

test-browser: .venv/.installed  ## JupyterLab in a headless Chromium (CHROMIUM=... chooses one)
	@CHROMIUM="$(CHROMIUM)" .venv/bin/python -m pytest tests/browser

test: .venv/.installed  ## all checks: package in sync, style, notebooks, tests
	@.ci/test

lab: .venv/.installed  ## JupyterLab
	.venv/bin/jupyter-lab

figures: .venv/.installed  ## FIGURES (by default all) at SCALE=smoke, cpu or paper, into outputs/SCALE
	@case "$(SCALE)" in smoke|cpu|paper) ;; \
	    *) echo "unknown SCALE=$(SCALE): use smoke, cpu or paper" >&2; exit 2 ;; esac
	@for figure in $(FIGURES); do case " $(ALL_FIGURES) " in *" $$figure "*) ;; \
	    *) echo "unknown figure $$figure: use $(ALL_FIGURES)" >&2; exit 2 ;; esac; done
	@set -e; for figure in $(FIGURES); do \
	    parameters=; \
	    case "$$figure" in \
	        figure3_grid|figure3_ant) \
	            notebook=10_figure3; parameters="-p experiment $${figure#figure3_}" ;; \
	        figure4) notebook=11_figure4 ;; \
	        figure5) notebook=12_figure5 ;; \
	        figure5_longer) \
	            notebook=12_figure5; parameters="-p experiment ant_projected_longer" ;; \
	        figure5_pendulum) \
	            notebook=12_figure5; \
	            parameters="-p experiment pendulum_projected -p controls True" ;; \
	        projection_study) notebook=13_projection_study ;; \
	        long_lifetimes) notebook=14_long_lifetimes ;; \
	        conditioning) notebook=15_conditioning ;; \
	        claims) notebook=16_claims ;; \
	    esac; \
	    echo "== $$figure at scale $(SCALE)"; \
	    $(NOTEBOOK) "nbs/$$notebook.ipynb" "$(OUTPUTS)/$(SCALE)/$$figure.ipynb" \
	        $$parameters -p scale "$(SCALE)"; \
	done

# Made anew each time: Sphinx is silent about the faults of pages that it need not read again.
docs: .venv/.installed  ## documentation site with all its internal links checked, into build/docs
	@rm -rf build/docs build/docs-source build/docs-cache && mkdir -p build/docs-source
	.venv/bin/python -m sphinx -q -j 2 -W --keep-going -c docs -d build/docs-cache \
	    build/docs-source build/docs
	.venv/bin/python docs/check_site.py build/docs

clean:  ## remove .venv, caches, demo and smoke outputs (histories and checkpoints stay)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	rm -rf "$(OUTPUTS)/demo" "$(OUTPUTS)/smoke"
	find gla_nb nbs tests -name __pycache__ -o -name .ipynb_checkpoints | while IFS= read -r folder; \
	    do rm -rf "$$folder"; done
