/* This network rounds in two steps, as CMSIS-NN does by default. */
#if defined(CMSIS_NN_USE_SINGLE_ROUNDING)
#error "this network rounds as R1: compile it and CMSIS-NN without CMSIS_NN_USE_SINGLE_ROUNDING"
#endif
