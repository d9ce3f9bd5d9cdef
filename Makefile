# The developers' menu. Run it inside the environment that `pip install -e '.[test,bench,dev]'` made.
SOURCES = $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/tests/on_host/*.cpp \
	csrc/tests/on_host/cuda/*.h)
.PHONY: help test isas campaign bench lint format sanitize arm64 wheel clean

help:       ## this list
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

test:       ## all tests
	python -m pytest -n auto --dist worksteal

# Tests that name the sets run under each of them anyway, and those of CUDA and Triton under none.
isas:       ## the op tests under each instruction set that is narrower than this processor's
	isas=$$(python -c "from minbert.kernels import native; print(*native.library().isas()[:-1])") || exit 1; \
	for isa in $$isas; do \
		echo "MINBERT_ISA=$$isa" && MINBERT_ISA=$$isa python -m pytest -n auto --dist worksteal tests/kernels \
			-k "not portable and not avx2 and not avx512 and not cuda and not gpus and not bfloat16_products" \
			|| exit 1; \
	done

campaign:   ## a night's work: 100 SIGKILLs of a run, 2,000 mutated files
	python tests/kill_campaign.py --count 100
	python tests/mutate_files.py --count 2000

bench:      ## all benchmarks, with ratios to their peers
	python -m pytest bench/ --benchmark-only

lint:       ## ruff, clang-format and mypy
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(SOURCES)
	rm -rf build/types && mkdir -p build/types/minbert
	ln -s $(CURDIR)/minbert/* build/types/minbert/ && ln -s $(CURDIR)/kernels build/types/minbert/kernels
	cd build/types && mypy --config-file $(CURDIR)/pyproject.toml -p minbert

format:     ## let ruff and clang-format rewrite what they can
	ruff check --fix .
	ruff format .
	clang-format -i $(SOURCES)

sanitize:   ## the C++ checks under AddressSanitizer + UndefinedBehaviorSanitizer, then ThreadSanitizer
	cmake -S . -B build/asan -G Ninja -DMINBERT_TESTS=ON -DMINBERT_SANITIZE=address,undefined
	cmake --build build/asan && ctest --test-dir build/asan --output-on-failure
	cmake -S . -B build/tsan -G Ninja -DMINBERT_TESTS=ON -DMINBERT_SANITIZE=thread
	cmake --build build/tsan && ctest --test-dir build/tsan --output-on-failure

arm64:      ## the C++ checks compiled for arm64 (g++-aarch64-linux-gnu), under qemu-user
	cmake -S . -B build/arm64 -G Ninja -DMINBERT_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_NM=$$(command -v aarch64-linux-gnu-nm) \
		"-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu"
	cmake --build build/arm64 && ctest --test-dir build/arm64 --output-on-failure

wheel:      ## a source archive and a repaired wheel for this platform in dist/, tried in a fresh environment
	.ci/wheel

clean:      ## everything that was built
	rm -rf build dist *.egg-info kernels/*.so .mypy_cache .pytest_cache .ruff_cache .benchmarks
