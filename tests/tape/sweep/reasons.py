"""Why an op is refused: each refusal of the sweep says one of these.

The left side is found in the message, the right side is the mathematical statement behind it.
"""

REASONS = {
    "works along the examples": "a scan or transform along the batch makes each row depend on others",
    "statistic over the examples": "an extreme, product, norm or order statistic of the batch",
    "einsum sums over the examples": "the contracted index is the batch",
    "contracts the examples": "the contracted index is the batch",
    "rows or columns of a matrix are the examples": "a decomposition mixes all entries of a matrix",
    "dimension 0, where the examples are not": "channels, positions or weights are no batch dimension",
    "an unbatched": "without a batch dimension the first one is channels, which the op mixes",
    "padding along the examples": "rows would belong to no example",
    "in different places": "operands pair examples with each other",
    "broadcast along its examples": "one row is paired with all",
    "examples vary along several dimensions": "no one dimension of the result tells examples apart",
    "folds examples together": "no one dimension of the result tells examples apart",
    "rows move between examples": "an index moves data across the batch",
    "only some of the examples": "an index leaves out a part of the batch by position",
    "indices into the flattened batch": "an index moves data across the batch",
    "looks up in the flattened batch": "an index moves data across the batch",
    "writes into the flattened batch": "an index moves data across the batch",
    "of another example": "one example's index, mask or weight acts on another's rows",
    "of others": "one example's index, mask or weight acts on another's rows",
    "is another example's": "one example's counts act on another's rows",
    "to another example": "rows of two examples meet in one place",
    "indices of different examples": "rows of two examples meet in one place",
    "several examples are written to one place": "rows of two examples meet in one place",
    "rows that are not their own": "two examples could have written to one place",
    "an index moves rows": "an index moves data across the batch",
    "examples are written over": "rows of two examples meet in one place",
    "examples are written into constants": "which place a row goes to depends on other rows",
    "which element of a constant": "how many elements earlier examples took decides",
    "depends on the examples": "how often a constant is repeated decides where later rows stand",
    "one example is written over others": "rows of two examples meet in one place",
    "carries examples": "a weight, size, scale or table that is shared by all rows is the batch's",
    "carry examples": "a weight, size, scale or table that is shared by all rows is the batch's",
    "carry the examples elsewhere": "operands pair examples with each other",
    "rows that belong to no example": "constant rows would stand among the examples'",
    "a constant with one": "where irregular rows stand depends on other examples",
    "counts over the examples": "a histogram of the batch",
    "takes the extremes of the examples": "a histogram of the batch",
    "compares the examples with each other": "sets and distances of the batch",
    "one number of all examples": "no row of the result is one example's",
    "by strides": "strides name memory, not rows",
    "segments are counted over the batch": "lengths of segments decide where later ones begin",
    "the rows of the loss are not the examples": "the loss treats another dimension as rows",
    "the loss is of one row": "one loss of all examples",
    "the classes lie where the examples are": "a softmax over the batch",
    "whose divisor depends on the whole batch": "a count over the batch divides every loss",
    "divided by the weights of the whole batch": "a sum of weights divides every loss",
    "a mean over examples of unequal sizes": "longer examples would weigh more",
    "batchmean divides by dimension 0": "the divisor is no number of examples",
    "statistics from the whole batch": "BatchNorm in training mode",
    "updates running statistics": "running statistics average over the batch",
    "the channels are the examples": "statistics of a channel are those of one example, kept for all",
    "normalisation over the examples": "mean and variance over the batch",
    "norms are taken over the examples": "a norm over the batch scales every row",
    "attention across the examples": "every row attends to others",
    "decides by the values of the batch": "control flow that depends on all examples",
    "number of classes is taken from": "one more than the largest class of the batch",
    "cut where one example's end": "lengths of earlier examples decide where later ones begin",
    "sorted rows and the values": "a row is looked up in another example's",
    "variance is of other examples": "operands pair examples with each other",
    "joins a value reduced over the examples": "a statistic of the batch meets single rows",
    "is not linear": "a function of a sum over the batch",
    "multiplies": "a product of sums over the batch",
    "reinterpreted at another size": "bytes of several elements form one",
    "different examples meet": "operands are whole examples, and different ones",
    "another forward pass": "state of an earlier step",
    "of the same examples": "a row is looked up in another example's",
    "a bag holds ids of several examples": "a bag sums over examples",
    "ids in a row that are not the batch's": "a bag's ids are no example's",
    "out of range": "torch reads past the end",
    "overwritten with values of the batch": "state of the model would keep private data",
    "takes a statistic": "a loss that needs no gradient is a statistic of the batch",
}

# Ops of the sweep that no rule and no decomposition covers, and why none was written.
NOT_FOLLOWED = {
    "to_sparse": "the layout's index depends on which values are zero",
    "_batch_norm_with_update": "BatchNorm in training mode, with buffers that it writes to",
    "_batch_norm_with_update_functional": "BatchNorm in training mode",
    "nonzero_static": "the rows of earlier examples decide which of later ones fit",
    "_efficient_attention_forward": "a kernel of scaled_dot_product_attention, which is followed",
    "_flash_attention_forward": "a kernel of scaled_dot_product_attention, which is followed",
    "_scaled_mm": "float8 kernels",
    "linear_cross_entropy": "one kernel for F.linear and F.cross_entropy, which are followed",
    "normal": "random numbers whose mean is a tensor: reparametrise with randn_like",
}

# Functions that make no tensor of the batch, or need hardware or layouts that no model's forward has; a
# name that ends in _ stands for all that begin with it.
OUTSIDE = {
    "settings of torch": """set_ get_ is_ are_ use_ seed initial_seed manual_seed autocast_
        clear_autocast_cache init_num_threads compiled_with_ prepare_ thread_safe_ _has_torch_
        has_torch_ handle_torch_function assert_int_ profiler_""",
    "types, modules and tools that torch exports": """Optional classproperty boolean_dispatch typename
        compile fork wait load save import_ir_ parse_ merge_type_ unify_type_ ipu xpu mtia""",
    "new tensors that hold none of the batch": """bartlett_window blackman_window hamming_window
        hann_window kaiser_window empty_ from_ frombuffer fft_fftfreq fft_rfftfreq logspace tril_indices
        triu_indices range new""",
    "communication between processes": """all_gather all_gather_ all_reduce all_reduce_ all_to_all
        all_to_all_ broadcast reduce reduce_scatter reduce_scatter_ recv send""",
    "functions of functions, that torch.func runs": "vmap cond while_loop map map2 apply",
    "removed from torch": """eig lstsq lu matrix_rank solve symeig _symeig __div__ __long__
        __nonzero__""",
    "sparse layouts": """_dimI _dimV _coalesced ccol_indices col_indices crow_indices row_indices
        indices _indices values _values _nnz dense_dim sparse_ _sparse_ _to_dense dsmm hsmm saddmm
        to_sparse_coo resize_as_sparse to_mkldnn to_padded_tensor _nested_tensor_""",
    "quantised types": "quantize_ q_ qscheme int_repr dequantize quantized_",
    "kernels of one backend": """cudnn_ miopen_ mkldnn_ batch_norm_ scaled_mm grouped_mm
        scaled_grouped_mm native_norm conv_tbc""",
    "functions that look at no values": """as_subclass const_data_ptr record_stream _is_view
        sym_ _sym_ _functional_assert_ _to_dlpack allclose _make_dual
        _fw_primal slice_inverse""",
    "writes that no model makes": """constant kaiming_uniform embedding_renorm fill_diagonal resize
        resize_as reinforce""",
    "outputs of a size that is given, filled by earlier examples first": "nonzero_static",
}
