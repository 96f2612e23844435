// One backend object of ZipCacheCUDA: hands runs of nodes to a CUDA backend of the host and the KV
// nodes between them to the DeviceCache, on a stream of its own. Events keep the order. Which cells
// come and what their rows see is read in the host's own bytes, or, where these are many, once per
// graph from the device.
//
// A decode step whose launches are those of the step before is captured, the host's kernels
// included, and repeated as one CUDA graph: crossing streams twice a layer costs nothing there.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml/attention_node.h"
#include "ggml/buffer_locks.h"
#include "ggml/cuda/cuda_buffer.h"
#include "ggml/cuda/cuda_node.h"
#include "ggml/cuda/cuda_registry.h"
#include "ggml/cuda/cuda_shift.h"
#include "ggml/guards.h"
#include "ggml/log.h"
#include "ggml/tables.h"

namespace zipcache::ggml {
namespace {

// Nodes [0, n) for the host, then, if there is one, a layer of ours, or the shift of one's keys.
struct Piece {
  // The first node is a dummy that changes with each run: the host's CUDA backend makes graphs of
  // its own of nodes that stay the same, and those can't be part of ours.
  ggml_tensor dummy{};
  std::vector<ggml_tensor*> nodes;
  std::optional<CudaLayerNodes> layer;
  CudaGroup* group = nullptr;
  std::uint32_t index = 0;  // of the layer in its group
  const ggml_tensor* shift = nullptr;
};

class Backend {
 public:
  static constexpr const char* kName = kCudaDeviceName;

  Backend() : inner_(ggml_backend_dev_init(inner_device(), nullptr)) {
    if (inner_ == nullptr) {
      return;
    }
    theirs_done_ = ggml_backend_event_new(inner_device());
    ours_done_ = ggml_backend_event_new(inner_device());
    cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
  }
  ~Backend() {
    if (stream_ != nullptr) {
      cudaStreamSynchronize(stream_);
      forget_graph();
      cudaStreamDestroy(stream_);
    }
    for (ggml_backend_event_t event : {theirs_done_, ours_done_}) {
      if (event != nullptr) {
        ggml_backend_event_free(event);
      }
    }
    if (inner_ != nullptr) {
      ggml_backend_free(inner_);
    }
  }
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  bool valid() const {
    return inner_ != nullptr && theirs_done_ != nullptr && ours_done_ != nullptr &&
           stream_ != nullptr;
  }

  void synchronize() {
    ggml_backend_synchronize(inner_);
    cudaStreamSynchronize(stream_);
  }

  ggml_status compute(ggml_cgraph* graph) {
    if (!takes_over()) {
      return ggml_backend_graph_compute_async(inner_, graph);
    }
    rewrite(graph);
    if (refusal_) {
      return failed(*refusal_);
    }
    if (buffers_.empty()) {
      return ggml_backend_graph_compute_async(inner_, graph);
    }
    const BufferLocks<CudaKvBuffer> locks(buffers_);
    for (CudaKvBuffer* buffer : buffers_) {
      if (const auto error = buffer->take_error()) {
        return failed(*error);
      }
    }
    wait_for_theirs();
    std::uint64_t key = groups_.empty() ? 0 : uid_;  // shifts are not repeated
    for (const auto& [group, nodes] : groups_) {
      if (Status begun = begin(group, nodes); !begun) {
        return failed(begun.error());
      }
      const std::uint64_t launches = group->cache->repeatable();
      key = launches == 0 || key == 0 ? 0 : (key ^ launches) * 0x100000001b3u;
    }
    Status done = repeat_or_run(key);
    for (const auto& [group, nodes] : groups_) {
      done = done ? group->cache->end_step(stream_) : done;
      forget_host_bytes(nodes.keys->src[1]);
      forget_host_bytes(nodes.attend->src[3]);
    }
    wait_for_ours();
    return done ? GGML_STATUS_SUCCESS : failed(done.error());
  }

 private:
  void wait_for_theirs() {
    ggml_backend_event_record(theirs_done_, inner_);
    cudaStreamWaitEvent(stream_, static_cast<cudaEvent_t>(theirs_done_->context), 0);
  }
  void wait_for_ours() {
    cudaEventRecord(static_cast<cudaEvent_t>(ours_done_->context), stream_);
    ggml_backend_event_wait(inner_, ours_done_);
  }

  Status begin(CudaGroup* group, const CudaLayerNodes& nodes) {
    const AttendShape shape = attend_shape(nodes.attend);
    if (Status opened = group->buffer->open(group, shape.n_kv_heads, shape.key_dim); !opened) {
      return opened;
    }
    cuda::StepTensors step = step_tensors(nodes);
    const std::vector<float> slopes = alibi_slopes(shape.n_heads, shape.max_bias);
    step.slopes = slopes;
    step.host_rows = host_bytes(nodes.keys->src[1]);
    step.host_mask = host_bytes(nodes.attend->src[3]);
    if (Status begun = group->cache->begin_step(step, stream_); !begun) {
      return begun;
    }
    const cache::Budget& budget = *group->buffer->settings().budget;
    if (group->cache->device_bytes() > budget.limit()) {
      return out_of_memory("KV cache is full: " + std::to_string(group->cache->device_bytes()) +
                           " bytes on CUDA, limit " + std::to_string(budget.limit()) +
                           "; raise ZIPCACHE_LIMIT_MIB or shorten the context");
    }
    return ok_status();
  }

  // What the host wrote to an input before this graph, if that is known.
  static std::span<const std::byte> host_bytes(const ggml_tensor* input) {
    CudaKvBuffer* const buffer = input != nullptr ? cuda_buffer_of(input) : nullptr;
    return buffer != nullptr ? buffer->host_inputs().bytes_of(input->data, ggml_nbytes(input))
                             : std::span<const std::byte>();
  }
  static void forget_host_bytes(const ggml_tensor* input) {
    if (CudaKvBuffer* const buffer = input != nullptr ? cuda_buffer_of(input) : nullptr) {
      buffer->host_inputs().forget();
    }
  }

  // Seen once: run, and captured while the device works on it. From then on: repeated. Where a
  // graph of as many nodes has been captured before, the host's kernels have all the memory they
  // need, and that run is left out: a run without a graph costs as much as two steps.
  Status repeat_or_run(std::uint64_t key) {
    if (key != 0 && key == captured_key_) {
      return cuda::to_status(cudaGraphLaunch(executable_, stream_), "graph launch");
    }
    if (key == 0) {
      return run_pieces();
    }
    const bool is_first = graph_.n_nodes != captured_nodes_;
    if (is_first) {
      if (Status ran = run_pieces(); !ran) {
        return ran;
      }
    }
    if (Status captured = capture(key); !captured) {
      return captured;
    }
    return is_first ? ok_status()
                    : cuda::to_status(cudaGraphLaunch(executable_, stream_), "graph launch");
  }

  Status capture(std::uint64_t key) {
    captured_key_ = 0;
    cudaGraph_t captured = nullptr;
    Status begun =
        cuda::to_status(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "capture");
    if (!begun) {
      return begun;
    }
    wait_for_ours();  // the host's stream joins
    Status done = run_pieces();
    wait_for_theirs();
    const cudaError_t ended = cudaStreamEndCapture(stream_, &captured);
    if (done) {
      done = cuda::to_status(ended, "capture");
    }
    if (done) {
      done = instantiate(captured);
    }
    if (captured != nullptr) {
      cudaGraphDestroy(captured);
    }
    if (!done) {
      return done;
    }
    captured_key_ = key;
    captured_nodes_ = graph_.n_nodes;
    return ok_status();
  }

  Status instantiate(cudaGraph_t captured) {
    if (executable_ != nullptr) {
      cudaGraphExecUpdateResultInfo info{};
      if (cudaGraphExecUpdate(executable_, captured, &info) == cudaSuccess) {
        return ok_status();
      }
      cudaGetLastError();
      forget_graph();
    }
    return cuda::to_status(cudaGraphInstantiate(&executable_, captured, 0), "graph");
  }

  void forget_graph() {
    if (executable_ != nullptr) {
      cudaGraphExecDestroy(executable_);
      executable_ = nullptr;
    }
    captured_key_ = 0;
  }

  Status run_pieces() {
    for (Piece& piece : pieces_) {
      if (piece.nodes.size() > 1) {
        ++n_runs_;
        std::memcpy(piece.dummy.op_params, &n_runs_, sizeof n_runs_);
        ggml_cgraph range = graph_;
        range.nodes = piece.nodes.data();
        range.n_nodes = static_cast<int>(piece.nodes.size());
        range.n_leafs = 0;
        range.uid = 0;
        wait_for_ours();
        const ggml_status status = ggml_backend_graph_compute_async(inner_, &range);
        if (status != GGML_STATUS_SUCCESS) {
          return unsupported("the host's CUDA backend failed");
        }
        wait_for_theirs();
      }
      if (piece.shift != nullptr) {
        if (Status done = shift_keys(piece.shift, inner_, stream_); !done) {
          return done;
        }
      }
      if (piece.layer) {
        Status done =
            piece.group->cache->run_layer(piece.index, layer_tensors(*piece.layer), stream_);
        if (!done) {
          return done;
        }
      }
    }
    return ok_status();
  }

  // Makes pieces_ of the graph's nodes. The host computes a graph many times under one uid.
  void rewrite(const ggml_cgraph* graph) {
    graph_ = *graph;
    if (graph->uid != 0 && graph->uid == uid_) {
      return;
    }
    uid_ = 0;
    pieces_.clear();
    groups_.clear();
    buffers_.clear();
    refusal_.reset();
    CudaLayerNodes layer;
    open_piece();
    for (int i = 0; i < graph->n_nodes && !refusal_; ++i) {
      add(graph->nodes[i], &layer);
    }
    if (!refusal_ && layer.keys != nullptr) {
      refusal_ = unsupported("keys are stored without attention, which is not served on CUDA");
    }
    for (const auto& [group, nodes] : groups_) {
      std::size_t n = 0;
      for (const Piece& piece : pieces_) {
        n += piece.group == group;
      }
      if (!refusal_ && n != group->layers.size()) {
        refusal_ = unsupported(
            "found " + std::to_string(n) + " of " + std::to_string(group->layers.size()) +
            " layers of a KV cache in one graph; ZipCacheCUDA serves graphs with "
            "all of them: put all layers on it (-ngl 99)");
      }
    }
    uid_ = graph->uid;
  }

  Piece& open_piece() {
    Piece& piece = pieces_.emplace_back();
    piece.dummy.op = GGML_OP_NONE;
    piece.nodes.push_back(&piece.dummy);
    return piece;
  }

  void add(ggml_tensor* node, CudaLayerNodes* layer) {
    const NodeClass found =
        (node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0 ? NodeClass{} : classify_cuda(node);
    switch (found.kind) {
      case NodeKind::kOther:
      case NodeKind::kElsewhere:
        if (layer->keys != nullptr || layer->values != nullptr) {
          // Only views may stand between a layer's stores and its attention: their sources' memory
          // is the host's to use again after the store.
          if (node->op != GGML_OP_VIEW && node->op != GGML_OP_RESHAPE &&
              node->op != GGML_OP_PERMUTE && node->op != GGML_OP_TRANSPOSE &&
              node->op != GGML_OP_NONE) {
            refusal_ =
                unsupported(std::string("found ") + ggml_op_name(node->op) +
                            " between storing keys and attention, which is not served on CUDA; "
                            "use -dev ZipCache");
          }
        }
        pieces_.back().nodes.push_back(node);
        return;
      case NodeKind::kRefused:
        refusal_ = unsupported(found.reason);
        return;
      case NodeKind::kShift:
        if (layer->keys != nullptr || layer->values != nullptr) {
          refusal_ = unsupported("keys are shifted while a layer stores them");
          return;
        }
        pieces_.back().shift = node;
        use(cuda_kv_tensor(node)->group->buffer);
        open_piece();
        return;
      case NodeKind::kStore: {
        const CudaKvTensor* kv = cuda_kv_tensor(node);
        const ggml_tensor*& store = kv->tensor == Tensor::kKey ? layer->keys : layer->values;
        if (store != nullptr) {
          refusal_ = unsupported("a layer stores keys twice, which is not served on CUDA");
        }
        store = node;
        return;
      }
      case NodeKind::kAttend:
        return close_piece(node, layer);
    }
  }

  void close_piece(const ggml_tensor* attend, CudaLayerNodes* layer) {
    const CudaKvTensor* keys = cuda_kv_tensor(attend->src[1]);
    const CudaKvTensor* values = cuda_kv_tensor(attend->src[2]);
    if (keys == nullptr || values == nullptr || layer->keys == nullptr ||
        layer->values == nullptr || cuda_kv_tensor(layer->keys) != keys ||
        cuda_kv_tensor(layer->values) != values || keys->group != values->group) {
      refusal_ = unsupported(
          "attention reads keys that its layer did not store, or keys and values of unlike rows; "
          "not "
          "served on CUDA: use -dev ZipCache");
      return;
    }
    layer->attend = attend;
    Piece& piece = pieces_.back();
    piece.layer = *layer;
    piece.group = keys->group;
    piece.index = keys->index;
    const auto known = std::find_if(groups_.begin(), groups_.end(),
                                    [&](const auto& entry) { return entry.first == keys->group; });
    if (known == groups_.end()) {
      groups_.emplace_back(keys->group, *layer);
      use(keys->group->buffer);
    }
    *layer = {};
    open_piece();
  }

  void use(CudaKvBuffer* buffer) {
    if (std::find(buffers_.begin(), buffers_.end(), buffer) == buffers_.end()) {
      buffers_.push_back(buffer);
      std::sort(buffers_.begin(), buffers_.end());
    }
  }

  ggml_backend_t inner_;
  ggml_backend_event_t theirs_done_ = nullptr, ours_done_ = nullptr;
  cudaStream_t stream_ = nullptr;

  // The rewritten graph.
  ggml_cgraph graph_{};
  std::uint64_t uid_ = 0;  // 0 = none
  std::deque<Piece> pieces_;
  std::vector<std::pair<CudaGroup*, CudaLayerNodes>> groups_;  // with the nodes of a first layer
  std::vector<CudaKvBuffer*> buffers_;
  std::optional<Error> refusal_;

  std::uint64_t n_runs_ = 0;
  std::uint64_t captured_key_ = 0;
  int captured_nodes_ = 0;
  cudaGraphExec_t executable_ = nullptr;
};

ggml_guid_t guid() {
  static ggml_guid id = {0x7a, 0x69, 0x70, 0x63, 0x61, 0x63, 0x68, 0x65,
                         0x2d, 0x63, 0x75, 0x64, 0x61, 0x2d, 0x30, 0x31};
  return &id;
}

}  // namespace

ggml_backend_t make_cuda_backend(ggml_backend_dev_t device) {
  return BackendTable<Backend>::create(device, guid(), []() -> std::unique_ptr<Backend> {
    auto backend = std::make_unique<Backend>();
    if (!backend->valid()) {
      log_error("the host's CUDA device gave no backend, events or stream");
      return nullptr;
    }
    return backend;
  });
}

}  // namespace zipcache::ggml
