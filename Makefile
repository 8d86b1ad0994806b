# make run: set up, watch the demo, then serve.  make test: set up, lint, type-check, test.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install run test lint train-demo train-necks train-phantom turnaround encode-bench decode viewer conformance ingest fuzz fuzz-web soak soak-orthanc clean dicomweb-bench model-bench

install: .venv/.installed

# The constraints pin what was tested together. pip takes torch's build for this machine.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

run: install
	$(BIN)/cspine demo
	$(BIN)/cspine serve

# Two processes: much of what the tests do is wait, for a clock, a port or a process.
test: lint
	$(BIN)/pytest -n 2 --dist loadfile --max-worker-restart=0

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Trains the phantom's weights again, on the procedural phantom only.
train-phantom: install
	$(BIN)/cspine-train phantom --out model/weights/phantom

# The way RSNA 2022 takes, on a generated data set of its shape: about an hour. Given again, it goes on.
DEMO := runs/train-demo
train-demo: install
	test -f $(DEMO)/rsna/train.csv || { rm -rf $(DEMO)/rsna && \
	    $(BIN)/cspine-train --config training/demo.yaml rsna-demo --out $(DEMO)/rsna; }
	$(BIN)/cspine-train --config training/demo.yaml all --rsna $(DEMO)/rsna --cache $(DEMO)/cache \
	    --work $(DEMO)/work --out $(DEMO)/bundle --folds 0,1

# Trains the bundled weights again, from the atlas and OpenKBP in the folder DATA: make train-necks DATA=folder.
train-necks: install
	$(BIN)/cspine-train necks --data $(DATA) --out model/weights/necks

# Segmentations by the node and by highdicom alone, side by side; all objects of a case.
encode-bench: install
	$(BIN)/python -m benchmarks.encode

# How fast Instances are taken, beside Orthanc and dcmtk's storescp (both must be installed, and storescu).
ingest: install
	$(BIN)/python -m benchmarks.ingest

# Mutated PDUs and datasets at the receiver: 50,000, some minutes.
fuzz: install
	$(BIN)/python -m tests.fuzz_receiver

# Odd requests at the HTTP side: 20,000, some minutes.
fuzz-web: install
	CSPINE_FUZZ_EXAMPLES=20000 $(BIN)/pytest -q tests/test_web_fuzz.py

# Random kill -9 of every process under load, then 2,000 associations: about a quarter of an hour.
soak: install
	$(BIN)/python -m tests.soak

# The same beside a real Orthanc, which is killed too, in each of the five ways to the node: about an hour.
soak-orthanc: install
	$(BIN)/python -m tests.soak_orthanc

# From the last acknowledged Instance to the stored SEG and SR, by stage.
turnaround: install
	$(BIN)/python -m benchmarks.turnaround

# OHIF, the web viewer. Which version, and its checksum, is said in the script.
viewer: .viewer/index.html

.viewer/index.html:
	sh node/web/get_ohif.sh .viewer

# Reading a Series in each transfer syntax, in one process and in several.
decode: install
	$(BIN)/python -m benchmarks.decode

# The model by stage, by number of slices, and beside the compute of the challenge's winners.
model-bench: install
	$(BIN)/python -m benchmarks.model

# The conformance statement, from the code.
conformance: install
	$(BIN)/cspine conformance > docs/conformance.md

# The DICOMweb server beside Orthanc's: store, retrieve and find.
dicomweb-bench: install
	$(BIN)/python -m benchmarks.dicomweb

clean:
	rm -rf .venv .viewer build *.egg-info
