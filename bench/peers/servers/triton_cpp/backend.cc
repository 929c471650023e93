// A Triton backend for this network alone: the requests of a batch are computed together.
//
// Beside the configuration, which gives one input uint8[n, 784] and one output float32[n, 10], a model has
// VERSION/weights.f32 (network.h). Triton checks requests against the configuration before they come here.

#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "network.h"
#include "triton_api.h"

namespace {

constexpr char kOutput[] = "probabilities";
constexpr int64_t kRows = 256;  // max_batch_size of the configuration

#define RETURN_IF_ERROR(call) \
    if (TRITONSERVER_Error* error_ = (call)) return error_

// There is no one to tell that an answer could not be sent or a request not be released.
void ignore(TRITONSERVER_Error* error) {
    if (error != nullptr) TRITONSERVER_ErrorDelete(error);
}

TRITONSERVER_Error* internal(const std::exception& error) {
    return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INTERNAL, error.what());
}

class Instance {
   public:
    explicit Instance(std::shared_ptr<const Network> network) : network_(std::move(network)) {}

    // Answer the requests and release them; an error leaves all of them to the server.
    TRITONSERVER_Error* execute(TRITONBACKEND_Request** requests, uint32_t count) {
        const c10::InferenceMode guard;
        ends_.clear();
        int64_t rows = 0;
        for (uint32_t i = 0; i < count; ++i) {
            RETURN_IF_ERROR(gather(requests[i], rows));
            ends_.push_back(rows);
        }
        const at::Tensor probabilities = (*network_)(pixels_.narrow(0, 0, rows)).contiguous();
        const float* values = probabilities.const_data_ptr<float>();
        int64_t start = 0;
        for (uint32_t i = 0; i < count; ++i) {
            answer(requests[i], values + start * kClasses, ends_[i] - start);
            start = ends_[i];
        }
        return nullptr;
    }

   private:
    // Append a request's pixels, and count its rows.
    TRITONSERVER_Error* gather(TRITONBACKEND_Request* request, int64_t& rows) {
        TRITONBACKEND_Input* input = nullptr;
        uint64_t bytes = 0;
        uint32_t buffers = 0;
        RETURN_IF_ERROR(TRITONBACKEND_RequestInputByIndex(request, 0, &input));
        RETURN_IF_ERROR(TRITONBACKEND_InputProperties(input, nullptr, nullptr, nullptr, nullptr, &bytes, &buffers));
        const int64_t added = static_cast<int64_t>(bytes) / kPixels;
        if (rows + added > kRows) {
            return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_UNSUPPORTED, "max_batch_size is at most 256");
        }
        float* to = pixels_.mutable_data_ptr<float>() + rows * kPixels;
        for (uint32_t i = 0; i < buffers; ++i) {
            const void* buffer = nullptr;
            uint64_t size = 0;
            TRITONSERVER_MemoryType memory = TRITONSERVER_MEMORY_CPU;
            int64_t memory_id = 0;
            RETURN_IF_ERROR(TRITONBACKEND_InputBuffer(input, i, &buffer, &size, &memory, &memory_id));
            if (memory == TRITONSERVER_MEMORY_GPU) {
                return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_UNSUPPORTED, "pixels are wanted in main memory");
            }
            const auto* from = static_cast<const uint8_t*>(buffer);
            for (uint64_t j = 0; j < size; ++j) to[j] = static_cast<float>(from[j]);
            to += size;
        }
        rows += added;
        return nullptr;
    }

    static void answer(TRITONBACKEND_Request* request, const float* probabilities, int64_t rows) {
        TRITONBACKEND_Response* response = nullptr;
        if (TRITONSERVER_Error* error = TRITONBACKEND_ResponseNew(&response, request)) {
            ignore(error);
        } else {
            TRITONSERVER_Error* fault = fill(response, probabilities, rows);
            ignore(TRITONBACKEND_ResponseSend(response, TRITONSERVER_RESPONSE_COMPLETE_FINAL, fault));
            ignore(fault);  // the response has a copy
        }
        ignore(TRITONBACKEND_RequestRelease(request, TRITONSERVER_REQUEST_RELEASE_ALL));
    }

    static TRITONSERVER_Error* fill(TRITONBACKEND_Response* response, const float* probabilities, int64_t rows) {
        const int64_t shape[] = {rows, kClasses};
        const uint64_t bytes = static_cast<uint64_t>(rows * kClasses) * sizeof(float);
        TRITONBACKEND_Output* output = nullptr;
        void* buffer = nullptr;
        TRITONSERVER_MemoryType memory = TRITONSERVER_MEMORY_CPU;
        int64_t memory_id = 0;
        RETURN_IF_ERROR(TRITONBACKEND_ResponseOutput(response, &output, kOutput, TRITONSERVER_TYPE_FP32, shape, 2));
        RETURN_IF_ERROR(TRITONBACKEND_OutputBuffer(output, &buffer, bytes, &memory, &memory_id));
        if (memory == TRITONSERVER_MEMORY_GPU) {
            return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_UNSUPPORTED, "answers are written to main memory");
        }
        std::memcpy(buffer, probabilities, bytes);
        return nullptr;
    }

    std::shared_ptr<const Network> network_;
    std::vector<int64_t> ends_;  // of each request's rows
    at::Tensor pixels_ = at::empty({kRows, kPixels}, at::kFloat);  // of a batch, and kept for the next one
};

using SharedNetwork = std::shared_ptr<const Network>;

}  // namespace

extern "C" {

TRITONSERVER_Error* TRITONBACKEND_ModelInitialize(TRITONBACKEND_Model* model) {
    uint32_t major = 0, minor = 0;
    RETURN_IF_ERROR(TRITONBACKEND_ApiVersion(&major, &minor));
    if (major != 1) {
        return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_UNSUPPORTED, "the backend is made for version 1 of the API");
    }
    TRITONBACKEND_ArtifactType type = TRITONBACKEND_ARTIFACT_FILESYSTEM;
    const char* folder = nullptr;
    uint64_t version = 0;
    RETURN_IF_ERROR(TRITONBACKEND_ModelRepository(model, &type, &folder));
    RETURN_IF_ERROR(TRITONBACKEND_ModelVersion(model, &version));
    try {
        const std::string path = std::string(folder) + "/" + std::to_string(version) + "/weights.f32";
        auto state = std::make_unique<SharedNetwork>(std::make_shared<const Network>(path));
        RETURN_IF_ERROR(TRITONBACKEND_ModelSetState(model, state.get()));
        state.release();
    } catch (const std::exception& error) {
        return internal(error);
    }
    return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_ModelFinalize(TRITONBACKEND_Model* model) {
    void* state = nullptr;
    RETURN_IF_ERROR(TRITONBACKEND_ModelState(model, &state));
    delete static_cast<SharedNetwork*>(state);
    return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_ModelInstanceInitialize(TRITONBACKEND_ModelInstance* instance) {
    TRITONBACKEND_Model* model = nullptr;
    void* network = nullptr;
    RETURN_IF_ERROR(TRITONBACKEND_ModelInstanceModel(instance, &model));
    RETURN_IF_ERROR(TRITONBACKEND_ModelState(model, &network));
    try {
        auto state = std::make_unique<Instance>(*static_cast<SharedNetwork*>(network));
        RETURN_IF_ERROR(TRITONBACKEND_ModelInstanceSetState(instance, state.get()));
        state.release();
    } catch (const std::exception& error) {
        return internal(error);
    }
    return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_ModelInstanceFinalize(TRITONBACKEND_ModelInstance* instance) {
    void* state = nullptr;
    RETURN_IF_ERROR(TRITONBACKEND_ModelInstanceState(instance, &state));
    delete static_cast<Instance*>(state);
    return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_ModelInstanceExecute(TRITONBACKEND_ModelInstance* instance,
                                                       TRITONBACKEND_Request** requests, uint32_t count) {
    void* state = nullptr;
    RETURN_IF_ERROR(TRITONBACKEND_ModelInstanceState(instance, &state));
    try {
        return static_cast<Instance*>(state)->execute(requests, count);
    } catch (const std::exception& error) {
        return internal(error);
    }
}
}
