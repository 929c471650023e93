// The network in libtorch: what is linear about a pixel and a logit is folded into the weights as they are loaded.
#pragma once

#include <cstdint>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>

constexpr int64_t kWidths[] = {784, 256, 128, 10};
constexpr int64_t kLayers = 3;
constexpr int64_t kPixels = kWidths[0];
constexpr int64_t kClasses = kWidths[kLayers];

// Rows from which oneDNN's products are faster than MKL's, on an AMD EPYC (Zen 5): 54 and 56 us for eight rows,
// 43 and 26 for two, 162 and 477 for 64.
constexpr int64_t kManyRows = 8;

// The operation of torch that has this name and no other interface in C++.
template <typename Signature>
c10::TypedOperatorHandle<Signature> operation(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

class Network {
   public:
    // Of a file of float32: mean, std and temperature, then each layer's weights [outputs, inputs] and its bias.
    explicit Network(const std::string& path) {
        const c10::InferenceMode guard;
        std::ifstream file(path, std::ios::binary);
        const auto read = [&](at::IntArrayRef shape) {
            at::Tensor values = at::empty(shape, at::kFloat);
            file.read(static_cast<char*>(values.data_ptr()), static_cast<std::streamsize>(values.nbytes()));
            return values.to(at::kDouble);
        };
        const at::Tensor constants = read({3});
        std::vector<Layer> layers;
        for (int64_t i = 0; i < kLayers; ++i) {
            at::Tensor weights = read({kWidths[i + 1], kWidths[i]});
            at::Tensor bias = read({kWidths[i + 1]});
            layers.push_back({weights, bias});
        }
        if (!file || file.peek() != std::ifstream::traits_type::eof()) {
            throw std::runtime_error(path + " is not a file of this network's weights");
        }
        const double* numbers = constants.const_data_ptr<double>();
        const double mean = numbers[0], deviation = numbers[1], temperature = numbers[2];
        // w (pixel / 255 - mean) / std + b is linear in the pixel.
        layers.front().bias -= layers.front().weights.sum(1) * (mean / deviation);
        layers.front().weights /= 255 * deviation;
        layers.back().weights /= temperature;
        layers.back().bias /= temperature;
        for (const Layer& layer : layers) {
            const at::Tensor weights = layer.weights.to(at::kFloat);
            const at::Tensor bias = layer.bias.to(at::kFloat);
            plain_.push_back({weights.t(), bias});
            if (at::Context::hasMKLDNN()) laid_out_.push_back({lay_out_.call(weights, std::nullopt), bias});
        }
    }

    // Probabilities [n, 10] of pixels [n, 784], 0 to 255 as float32.
    at::Tensor operator()(const at::Tensor& pixels) const {
        const c10::InferenceMode guard;
        static thread_local const bool has_one_thread = (at::set_num_threads(1), true);  // OpenMP asks each thread
        (void)has_one_thread;
        const bool is_wide = pixels.size(0) >= kManyRows && !laid_out_.empty();
        return at::softmax(is_wide ? wide(pixels) : narrow(pixels), 1);
    }

    at::Tensor narrow(at::Tensor x) const {
        for (const Layer& layer : plain_) {
            x = at::addmm(layer.bias, x, layer.weights);
            if (&layer != &plain_.back()) x.relu_();
        }
        return x;
    }

    // A product, its bias and ReLU in one step of oneDNN, as torch's own compiler calls it.
    at::Tensor wide(at::Tensor x) const {
        for (const Layer& layer : laid_out_) {
            const bool is_last = &layer == &laid_out_.back();
            x = product_.call(x, layer.weights, layer.bias, is_last ? "none" : "relu", no_scalars_, "");
        }
        return x;
    }

   private:
    struct Layer {
        at::Tensor weights, bias;
    };
    using LayOut = at::Tensor(const at::Tensor&, std::optional<int64_t>);
    using Product = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                               std::string_view, c10::List<std::optional<at::Scalar>>,
                               std::optional<std::string_view>);

    c10::TypedOperatorHandle<LayOut> lay_out_ = operation<LayOut>("mkldnn::_reorder_linear_weight");
    c10::TypedOperatorHandle<Product> product_ = operation<Product>("mkldnn::_linear_pointwise");
    c10::List<std::optional<at::Scalar>> no_scalars_;
    std::vector<Layer> plain_;     // weights [inputs, outputs], for MKL
    std::vector<Layer> laid_out_;  // in oneDNN's own order
};
