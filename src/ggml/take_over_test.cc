#include "ggml/take_over.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>

#include "ggml-backend-impl.h"
#include "ggml.h"
#include "ggml/attention_node.h"
#include "ggml/buffer.h"

namespace zipcache::ggml {
namespace {

constexpr std::int64_t kDim = 64, kKvHeads = 3, kHeads = 9, kCells = 512, kStreams = 4;

// Graphs as llama.cpp builds them, without memory behind them.
class TakeOverTest : public ::testing::Test {
 protected:
  TakeOverTest()
      : context_(ggml_init(
            {.mem_size = 128 * ggml_tensor_overhead(), .mem_buffer = nullptr, .no_alloc = true})) {
    ours_.buft = buffer_type();
    keys_ = cache_tensor("cache_k_l0");
    values_ = cache_tensor("cache_v_l0");
  }
  ~TakeOverTest() override { ggml_free(context_); }

  ggml_tensor* cache_tensor(const char* name) {
    ggml_tensor* tensor =
        ggml_new_tensor_3d(context_, GGML_TYPE_F16, kDim * kKvHeads, kCells, kStreams);
    ggml_set_name(tensor, name);
    tensor->buffer = &ours_;
    return tensor;
  }

  // What attention reads: cells [0, n_cells) of streams first .. first + n - 1.
  ggml_tensor* view(ggml_tensor* cache, std::int64_t n_cells, std::int64_t first, std::int64_t n) {
    const std::size_t row = cache->nb[1];
    ggml_tensor* rows = ggml_view_4d(context_, cache, kDim, kKvHeads, n_cells, n,
                                     kDim * sizeof(Half), row, row * kCells, row * kCells * first);
    return ggml_permute(context_, rows, 0, 2, 1, 3);
  }

  ggml_tensor* attention(ggml_tensor* keys, ggml_tensor* values, std::int64_t n_rows = 5) {
    ggml_tensor* query =
        ggml_new_tensor_4d(context_, GGML_TYPE_F32, kDim, kHeads, n_rows, keys->ne[3]);
    ggml_tensor* mask =
        ggml_new_tensor_4d(context_, GGML_TYPE_F16, keys->ne[1], n_rows, 1, keys->ne[3]);
    return ggml_flash_attn_ext(context_, ggml_permute(context_, query, 0, 2, 1, 3), keys, values,
                               mask, 0.125f, 8.0f, 30.0f);
  }

  NodeKind kind(const ggml_tensor* node) const { return classify(node, buffer_type()).kind; }

  ggml_context* context_;
  ggml_backend_buffer ours_{};
  ggml_tensor* keys_;
  ggml_tensor* values_;
};

TEST_F(TakeOverTest, Attention) {
  const ggml_tensor* node = attention(view(keys_, 256, 1, 2), view(values_, 256, 1, 2));
  ASSERT_EQ(kind(node), NodeKind::kAttend);
  const AttendShape shape = attend_shape(node);
  EXPECT_EQ(shape.n_rows, 5u);
  EXPECT_EQ(shape.n_heads, 9u);
  EXPECT_EQ(shape.n_kv_heads, 3u);
  EXPECT_EQ(shape.key_dim, 64u);
  EXPECT_EQ(shape.n_cells, 256u);
  EXPECT_EQ(shape.first_stream, 1u);
  EXPECT_EQ(shape.n_streams, 2u);
  EXPECT_EQ(shape.max_bias, 8.0f);
  EXPECT_EQ(shape.softcap, 30.0f);
  EXPECT_EQ(shape.scale, 0.125f);
}

TEST_F(TakeOverTest, NewRows) {
  ggml_tensor* rows = ggml_new_tensor_2d(context_, GGML_TYPE_F32, kDim * kKvHeads, 7);
  ggml_tensor* index = ggml_new_tensor_1d(context_, GGML_TYPE_I64, 7);
  ggml_tensor* merged = ggml_reshape_2d(context_, keys_, kDim * kKvHeads, kCells * kStreams);
  EXPECT_EQ(kind(ggml_set_rows(context_, merged, rows, index)), NodeKind::kStore);
  EXPECT_EQ(kind(merged), NodeKind::kOther) << "a view moves nothing";
}

TEST_F(TakeOverTest, TransposedValuesAreRefused) {
  ggml_tensor* elements = ggml_new_tensor_2d(context_, GGML_TYPE_F32, 1, kDim * kKvHeads);
  ggml_tensor* index = ggml_new_tensor_1d(context_, GGML_TYPE_I64, kDim * kKvHeads);
  ggml_tensor* flat = ggml_reshape_2d(context_, values_, 1, ggml_nelements(values_));
  const NodeClass found = classify(ggml_set_rows(context_, flat, elements, index), buffer_type());
  EXPECT_EQ(found.kind, NodeKind::kRefused);
  EXPECT_NE(found.reason.find("-fa on"), std::string::npos);
}

TEST_F(TakeOverTest, Shift) {
  ggml_tensor* shifts = ggml_new_tensor_1d(context_, GGML_TYPE_I32, kCells * kStreams);
  ggml_tensor* rows = ggml_view_3d(context_, keys_, kDim, kKvHeads, kCells * kStreams,
                                   kDim * sizeof(Half), keys_->nb[1], 0);
  const auto rope = [&](ggml_tensor* of, int n_rot) {
    return ggml_rope_ext_inplace(context_, of, shifts, nullptr, n_rot, 0, 0, 1e4f, 1, 0, 1, 0, 0);
  };
  EXPECT_EQ(kind(rope(rows, kDim)), NodeKind::kShift);
  // Rotary embedding of the first half of each head only.
  ggml_tensor* halves = ggml_view_3d(context_, keys_, kDim / 2, kKvHeads, kCells * kStreams,
                                     kDim * sizeof(Half), keys_->nb[1], 0);
  EXPECT_EQ(kind(rope(halves, kDim / 2)), NodeKind::kShift);
  ggml_tensor* of_values = ggml_view_3d(context_, values_, kDim, kKvHeads, kCells * kStreams,
                                        kDim * sizeof(Half), values_->nb[1], 0);
  EXPECT_EQ(kind(rope(of_values, kDim)), NodeKind::kRefused);
}

TEST_F(TakeOverTest, OtherMemoryIsLeftAlone) {
  ggml_backend_buffer elsewhere{};
  keys_->buffer = values_->buffer = &elsewhere;
  EXPECT_EQ(kind(attention(view(keys_, 256, 0, 1), view(values_, 256, 0, 1))),
            NodeKind::kElsewhere);
  ggml_tensor* rows = ggml_new_tensor_2d(context_, GGML_TYPE_F32, kDim * kKvHeads, 7);
  ggml_tensor* index = ggml_new_tensor_1d(context_, GGML_TYPE_I64, 7);
  ggml_tensor* merged = ggml_reshape_2d(context_, keys_, kDim * kKvHeads, kCells * kStreams);
  EXPECT_EQ(kind(ggml_set_rows(context_, merged, rows, index)), NodeKind::kOther);
}

TEST_F(TakeOverTest, KeysAsValuesAreRefused) {
  const NodeClass found =
      classify(attention(view(keys_, 256, 0, 1), view(keys_, 256, 0, 1)), buffer_type());
  EXPECT_EQ(found.kind, NodeKind::kRefused);
  EXPECT_NE(found.reason.find("MLA"), std::string::npos);
}

TEST_F(TakeOverTest, OtherReadersAreRefused) {
  ggml_tensor* query = ggml_new_tensor_4d(context_, GGML_TYPE_F32, kDim, 5, kHeads, 1);
  EXPECT_EQ(kind(ggml_mul_mat(context_, view(keys_, 256, 0, 1), query)), NodeKind::kRefused);
}

// The values of the ALiBi paper: for 8 heads 2^-1, 2^-2, ...; for 12 heads every other one of 16
// follows.
TEST(Alibi, Slopes) {
  EXPECT_TRUE(alibi_slopes(8, 0.0f).empty());
  const std::vector<float> eight = alibi_slopes(8, 8.0f);
  const std::vector<float> twelve = alibi_slopes(12, 8.0f);
  ASSERT_EQ(eight.size(), 8u);
  ASSERT_EQ(twelve.size(), 12u);
  for (int head = 0; head < 8; ++head) {
    EXPECT_FLOAT_EQ(eight[head], std::exp2(-float(head + 1)));
    EXPECT_FLOAT_EQ(twelve[head], eight[head]);
  }
  for (int head = 8; head < 12; ++head) {
    EXPECT_FLOAT_EQ(twelve[head], std::exp2(-(2 * (head - 8) + 1) * 0.5f));
  }
}

}  // namespace
}  // namespace zipcache::ggml
