// The Python module grpo_engine.micro._corpus: the generator of the embedded tasks. It needs no Torch, and whoever imports
// the ops does not load it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "tasks/micro_corpus.h"

namespace py = pybind11;

namespace grpo_engine {
namespace {

using Words = std::vector<std::string>;

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

void bind_source(py::module_& module) {
  py::enum_<Domain>(module, "Domain")
      .value("chain", Domain::chain)
      .value("word", Domain::word)
      .value("code", Domain::code)
      .value("logic", Domain::logic);
  py::class_<MicroSource>(module, "MicroSource", "Samples problems of the embedded tasks (csrc/tasks/micro_corpus.h).")
      .def(py::init([](const std::vector<uint32_t>& state, Words vocabulary, Words functions, Words letters, Words people,
                       int64_t limit, int64_t operand, double test_share) {
             return MicroSource(MicroTasks{std::move(vocabulary), std::move(functions), std::move(letters),
                                           std::move(people), limit, operand, test_share},
                                state);
           }),
           py::arg("state"), py::kw_only(), py::arg("vocabulary"), py::arg("functions"), py::arg("letters"),
           py::arg("people"), py::arg("limit"), py::arg("operand"), py::arg("test_share"),
           "state: random.Random(...).getstate()[1].")
      .def(
          "item",
          [](MicroSource& self, Domain domain, int64_t grade) {
            const MicroItem item = self.item(domain, grade);
            return py::make_tuple(item.key, self.text(item.prompt), self.text({item.values.back()}));
          },
          py::arg("domain"), py::arg("grade"), "The next problem: (key, prompt, answer), all text.")
      .def("is_test", &MicroSource::is_test, py::arg("key"), "Whether a key belongs to the test pool.");
}

void bind_corpus(py::module_& module) {
  py::class_<MicroCorpus>(module, "MicroCorpus", "Documents of the embedded tasks, without end.")
      .def(py::init([](const MicroSource& source, const std::array<double, 4>& domains, double direct, double error,
                       double chat, float prompt_weight, std::vector<int64_t> sum_terms, std::vector<int64_t> list_lengths,
                       std::vector<int64_t> name_counts, std::unordered_set<std::string> held_out) {
             return MicroCorpus(source,
                                CorpusShares{domains, direct, error, chat, prompt_weight, std::move(sum_terms),
                                             std::move(list_lengths), std::move(name_counts)},
                                std::move(held_out));
           }),
           py::arg("source"), py::kw_only(), py::arg("domains"), py::arg("direct"), py::arg("error"), py::arg("chat"),
           py::arg("prompt_weight"), py::arg("sum_terms"), py::arg("list_lengths"), py::arg("name_counts"),
           py::arg("held_out"))
      .def(
          "document",
          [](MicroCorpus& self) {
            MicroDocument d = self.document();
            return py::make_tuple(std::move(d.tokens), d.prompt_length);
          },
          "The next document: (tokens, how many of them are the prompt's). RuntimeError when it "
          "holds a test problem.")
      .def(
          "batch",
          [](MicroCorpus& self, int64_t documents, int64_t max_tokens) {
            const MicroBatch batch = self.batch(documents, max_tokens);
            return py::make_tuple(to_array(batch.tokens), to_array(batch.cu_seqlens), to_array(batch.target),
                                  to_array(batch.weight));
          },
          py::arg("documents"), py::arg("max_tokens"),
          "The next documents packed: (tokens [T], cu_seqlens [N+1], target [T], weight [T]); N is "
          "`documents`, or fewer as soon as T reaches `max_tokens`.");
}

}  // namespace
}  // namespace grpo_engine

PYBIND11_MODULE(_corpus, m) {
  m.doc() = "Native half of grpo_engine.micro.";
  grpo_engine::bind_source(m);
  grpo_engine::bind_corpus(m);
}
