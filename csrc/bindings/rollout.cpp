// The arrays of a plan are views into its vectors, not copies. A NumPy array keeps its plan alive, and torch.from_numpy
// shares its memory. std::invalid_argument reaches Python as ValueError, std::logic_error as RuntimeError.
#include "bindings/rollout.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "rollout/scheduler.h"

namespace py = pybind11;

namespace grpo_engine {
namespace {

using Tokens = py::array_t<int64_t, py::array::c_style>;

// A vector member of StepPlan as a writable array of shape `shape`.
template <typename T>
py::array_t<T> view(const py::object& plan, std::vector<T> StepPlan::* member, std::vector<py::ssize_t> shape) {
  auto& values = plan.cast<StepPlan&>().*member;
  return py::array_t<T>(std::move(shape), values.data(), plan);
}

template <typename T>
void def_vector(py::class_<StepPlan>& cls, const char* name, std::vector<T> StepPlan::* member, const char* doc) {
  const auto get = [member](const py::object& plan) {
    const auto size = static_cast<py::ssize_t>((plan.cast<StepPlan&>().*member).size());
    return view(plan, member, {size});
  };
  cls.def_property_readonly(name, get, doc);
}

// Seeds are 64 bits, read as signed or unsigned: 2**64 - 1 and -1 are the same seed.
int64_t seed_bits(const py::handle& value, size_t index) {
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!number) throw py::error_already_set();
  int overflow = 0;
  const long long bits = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow == 0) return bits;
  if (overflow > 0) {
    const unsigned long long unsigned_bits = PyLong_AsUnsignedLongLong(number.ptr());
    if (!PyErr_Occurred()) return static_cast<int64_t>(unsigned_bits);
    PyErr_Clear();
  }
  throw std::invalid_argument("add_group: seeds must be in [-2**63, 2**64), got " + py::str(number).cast<std::string>() +
                              " at index " + std::to_string(index));
}

void bind_plan(py::module_& module) {
  py::class_<StepPlan> cls(module, "StepPlan",
                           "One step of the model: T packed tokens of N sequences, from which S "
                           "tokens are sampled. Arrays are views that keep the plan alive.");
  def_vector(cls, "tokens", &StepPlan::tokens, "[T] int64, ids; -1 - s: sample s of the plan before");
  def_vector(cls, "positions", &StepPlan::positions, "[T] int64, of each token in its sequence");
  def_vector(cls, "slots", &StepPlan::slots,
             "[T] int64, page * page_size + offset where the token's key and value are written");
  def_vector(cls, "cu_query", &StepPlan::cu_query, "[N+1] int32, start of each sequence in tokens");
  def_vector(cls, "kv_len", &StepPlan::kv_len, "[N] int32, tokens of each sequence up to and with this step's");
  cls.def_property_readonly(
      "page_table",
      [](const py::object& self) {
        const auto& plan = self.cast<StepPlan&>();
        return view(self, &StepPlan::page_table,
                    {static_cast<py::ssize_t>(plan.kv_len.size()), static_cast<py::ssize_t>(plan.page_table_width)});
      },
      "[N, max_pages] int32, pages of each sequence in order, -1 past the end");
  cls.def_property_readonly(
      "page_copies",
      [](const py::object& self) {
        const auto& plan = self.cast<StepPlan&>();
        return view(self, &StepPlan::page_copies, {static_cast<py::ssize_t>(plan.page_copies.size() / 2), 2});
      },
      "[C, 2] int32, source and destination pages to copy before the step writes; none is both");
  def_vector(cls, "sample_row", &StepPlan::sample_row, "[S] int64, row of tokens whose hidden state is sampled from");
  def_vector(cls, "sample_seq", &StepPlan::sample_seq, "[S] int64, id of the sequence that the sampled token belongs to");
  def_vector(cls, "sample_seed", &StepPlan::sample_seed, "[S] int64");
  def_vector(cls, "sample_position", &StepPlan::sample_position,
             "[S] int64, position of the token to sample = length of its sequence so far");
  cls.def_property_readonly(
         "num_decode_tokens", [](const StepPlan& plan) { return plan.counts.decode; },
         "Response tokens among the T, computed for the first time.")
      .def_readonly("decode_only", &StepPlan::decode_only,
                    "Whether N = T = S: a token of each sequence, and a sample of each token.");
}

void bind_totals(py::module_& module) {
  py::class_<SchedulerTotals>(module, "SchedulerTotals",
                              "Sums since construction; tokens count when their step is committed.")
      .def_property_readonly(
          "prefill_tokens", [](const SchedulerTotals& totals) { return totals.tokens.prefill; },
          "Prompt tokens computed for the first time; each prompt counts once per group.")
      .def_property_readonly(
          "recomputed_tokens", [](const SchedulerTotals& totals) { return totals.tokens.recomputed; },
          "Tokens computed again after a preemption.")
      .def_property_readonly(
          "decode_tokens", [](const SchedulerTotals& totals) { return totals.tokens.decode; },
          "Response tokens computed for the first time; the last of a response never is.")
      .def_readonly("prefill_pairs", &SchedulerTotals::prefill_pairs, "Query-key pairs of prompt and recomputed tokens.")
      .def_readonly("decode_pairs", &SchedulerTotals::decode_pairs, "Query-key pairs of response tokens.")
      .def_readonly("prefill_samples", &SchedulerTotals::prefill_samples,
                    "Tokens sampled after prompt tokens and after recomputed tokens.")
      .def_readonly("decode_samples", &SchedulerTotals::decode_samples, "Tokens sampled after response tokens.")
      .def_readonly("preemptions", &SchedulerTotals::preemptions, "Times that a running sequence lost its pages.");
}

void bind_scheduler(py::module_& module) {
  py::class_<Scheduler>(module, "Scheduler",
                        "Decides which tokens of which sequences the model computes in each step, "
                        "and in which KV pages (csrc/rollout/scheduler.h).")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, bool>(), py::arg("num_pages"), py::kw_only(),
           py::arg("page_size") = 16, py::arg("max_running"), py::arg("max_step_tokens"), py::arg("lookahead") = false)
      .def(
          "add_group",
          [](Scheduler& self, const std::vector<int64_t>& prompt, int64_t group_size, int64_t max_new_tokens,
             const py::sequence& seeds, const std::vector<int64_t>& stop_ids) {
            std::vector<int64_t> bits;
            for (const py::handle seed : seeds) bits.push_back(seed_bits(seed, bits.size()));
            return self.add_group(prompt, group_size, max_new_tokens, bits, stop_ids);
          },
          py::arg("prompt"), py::kw_only(), py::arg("group_size"), py::arg("max_new_tokens"), py::arg("seeds"),
          py::arg("stop_ids"),
          "Queues a prompt (token ids) with group_size responses, one seed each. Returns the group's "
          "id, which is also the id of its first response; response g has id + g. Raises ValueError "
          "for a request that is malformed or could never fit.")
      .def("schedule", &Scheduler::schedule,
           "Plans the next step. Raises RuntimeError without work, or while the last plan is not "
           "committed; with lookahead, one plan may be.")
      .def(
          "commit",
          [](Scheduler& self, const Tokens& tokens) {
            if (tokens.ndim() != 1) {
              throw std::invalid_argument("commit: tokens must be [S], got an array of " + std::to_string(tokens.ndim()) +
                                          " dimensions");
            }
            return self.commit({tokens.data(), static_cast<size_t>(tokens.size())});
          },
          py::arg("tokens"),
          "Takes the sampled tokens [S] int64 of the oldest open plan; returns the ids that finished. "
          "Raises ValueError on a negative token, naming its sequence; the step stays open then.")
      .def("has_work", &Scheduler::has_work, "Whether there is something to schedule.")
      .def(
          "response", [](const Scheduler& self, int64_t id) { return self.sequence(id).response(); }, py::arg("sequence"),
          "Response tokens so far, as a list; the stop token is part of it.")
      .def(
          "finish",
          [](const Scheduler& self, int64_t id) -> std::optional<std::string> {
            const char* name = finish_name(self.sequence(id).finish());
            return name == nullptr ? std::nullopt : std::optional<std::string>(name);
          },
          py::arg("sequence"), "\"stop\", \"length\", or None while unfinished.")
      .def_property_readonly("max_running", &Scheduler::max_running)
      .def_property_readonly("num_pages", &Scheduler::num_pages)
      .def_property_readonly("totals", &Scheduler::totals, py::return_value_policy::copy);
}

}  // namespace
}  // namespace grpo_engine

void bind_rollout(py::module_& module) {
  grpo_engine::bind_plan(module);
  grpo_engine::bind_totals(module);
  grpo_engine::bind_scheduler(module);
}
