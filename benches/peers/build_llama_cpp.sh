#!/bin/sh
# Builds llama.cpp natively from the source package of llama-cpp-python into FOLDER (about 15 minutes on 2 cores), with
# what the comparisons need: llama-bench, llama-perplexity, llama-quantize and the shared library for
# check_exports.py. Prints the variables to set.
#
#     build_llama_cpp.sh FOLDER
set -eu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip"
"$pip" install -q cmake==4.4.4 ninja==1.13.2 numpy gguf==0.19.0 tokenizers diskcache jinja2 typing_extensions
# Not `--no-binary :all:`: pip would compile cmake itself.
"$pip" download -q --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d "$folder/source"
echo "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e  $folder/source/llama_cpp_python-0.3.36.tar.gz" |
    sha256sum -c -
tar -xzf "$folder/source/llama_cpp_python-0.3.36.tar.gz" -C "$folder/source" --strip-components=1
PATH="$folder/venv/bin:$PATH"
cmake -S "$folder/source/vendor/llama.cpp" -B "$folder/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_USE_PREBUILT_UI=OFF
cmake --build "$folder/build" --target llama llama-bench llama-perplexity llama-quantize
echo "export LLAMA_CPP_LIB_PATH=$folder/build/bin PYTHONPATH=$folder/source"
echo "$folder/venv/bin/python check_exports.py --help"
