// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// The schemas of every clusterkv op. Kernels register themselves beside their
// code: csrc/cpu/*.cpp in this module, csrc/cuda/*.cu in _C_cuda.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(clusterkv, m) {
  m.def(
      "index_pages(Tensor(a!) kv_cache, Tensor(b!) index, Tensor block_ids, "
      "Tensor num_sink_tokens, int num_iters) -> ()");
  m.def(
      "score_clusters(Tensor query, Tensor kv_cache, Tensor index, Tensor block_table, "
      "Tensor seq_lens, Tensor min_sparse_lens, float scale, int num_sink_tokens, "
      "Tensor(a!) scores, Tensor(b!) softmax_sums, Tensor? index_table=None) -> ()");
  m.def(
      "select_clusters(Tensor scores, Tensor softmax_sums, Tensor kv_cache, Tensor index, "
      "Tensor block_table, Tensor seq_lens, Tensor min_sparse_lens, int num_sink_tokens, "
      "int token_budget, Tensor(a!) selected, Tensor(b!) num_attended, "
      "Tensor? index_table=None) -> ()");
  m.def(
      "sparse_decode(Tensor query, Tensor kv_cache, Tensor index, Tensor block_table, "
      "Tensor seq_lens, Tensor min_sparse_lens, Tensor scores, Tensor selected, float scale, "
      "int num_sink_tokens, bool tail_estimate, Tensor(a!) workspace, Tensor(b!) output, "
      "Tensor? index_table=None, Tensor? host_cache=None, Tensor? line_table=None) -> ()");
  m.def(
      "recall(Tensor selected, Tensor scores, Tensor(a!) kv_cache, Tensor index, "
      "Tensor block_table, Tensor seq_lens, Tensor min_sparse_lens, int num_sink_tokens, "
      "Tensor index_table, Tensor host_cache, Tensor row_slots, Tensor hot_blocks, "
      "Tensor(b!) line_table, Tensor(c!) hot_lines, Tensor(d!) hot_order, "
      "Tensor(e!) counters) -> ()");
}

// Importing the module runs the registrations above; it exports nothing else.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
