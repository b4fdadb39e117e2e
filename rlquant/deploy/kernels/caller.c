/* Calls a policy's C function from Python, one observation at a time: no argument is converted and nothing is
 * allocated but the action. What is not an array of the usual kind goes to a Python function instead, which
 * converts it or says what is wrong with it. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#include <numpy/arrayobject.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#define MOST 8 /* dimensions */

typedef int64_t run_function(const void *constants, void *memory, const float *observation, const uint8_t *mask,
                             void *action, float *outputs, float *state, int64_t n);

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    run_function *run;
    const void *constants;
    void *memory;
    float *state;
    int dims, action_dims, action_type;
    npy_intp shape[MOST], action_shape[MOST], size;
    float *converted;
    PyObject *slow, *owners;
} Caller;

#define CONVERT(type)                                                                                            \
    do {                                                                                                         \
        const type *from = PyArray_DATA(array);                                                                  \
        for (npy_intp i = 0; i < self->size; ++i) self->converted[i] = (float)from[i];                           \
    } while (0)

static const float *numbers(Caller *self, PyObject *given)
{
    PyArrayObject *array = (PyArrayObject *)given;
    if (!PyArray_CheckExact(given) || PyArray_NDIM(array) != self->dims || !PyArray_ISCARRAY_RO(array)) return NULL;
    for (int i = 0; i < self->dims; ++i)
        if (PyArray_DIM(array, i) != self->shape[i]) return NULL;
    switch (PyArray_TYPE(array)) {
    case NPY_FLOAT: return PyArray_DATA(array);
    case NPY_DOUBLE: CONVERT(double); return self->converted;
    case NPY_UBYTE: CONVERT(uint8_t); return self->converted;
    default: return NULL;
    }
}

static PyObject *call(PyObject *callable, PyObject *const *arguments, size_t count, PyObject *names)
{
    Caller *self = (Caller *)callable;
    if (PyVectorcall_NARGS(count) == 1 && names == NULL) {
        const float *observation = numbers(self, arguments[0]);
        if (observation != NULL) {
            PyObject *action = PyArray_SimpleNew(self->action_dims, self->action_shape, self->action_type);
            if (action == NULL) return NULL;
            if (self->run(self->constants, self->memory, observation, NULL, PyArray_DATA((PyArrayObject *)action),
                          NULL, self->state, 1) == 0)
                return PyArray_Return((PyArrayObject *)action);
            Py_DECREF(action);
        }
    }
    return PyObject_Vectorcall(self->slow, arguments, count, names);
}

static int sizes(PyObject *tuple, int *dims, npy_intp *shape)
{
    *dims = (int)PyTuple_GET_SIZE(tuple);
    if (*dims > MOST) {
        PyErr_Format(PyExc_ValueError, "at most %d dimensions, got %d", MOST, *dims);
        return -1;
    }
    for (int i = 0; i < *dims; ++i) shape[i] = PyLong_AsSsize_t(PyTuple_GET_ITEM(tuple, i));
    return PyErr_Occurred() ? -1 : 0;
}

static int init(PyObject *object, PyObject *arguments, PyObject *names)
{
    Caller *self = (Caller *)object;
    unsigned long long run, constants, memory, state;
    PyObject *shape, *action_shape, *slow, *owners;
    if (!PyArg_ParseTuple(arguments, "KKKKO!O!iOO", &run, &constants, &memory, &state, &PyTuple_Type, &shape,
                          &PyTuple_Type, &action_shape, &self->action_type, &slow, &owners))
        return -1;
    if (sizes(shape, &self->dims, self->shape) || sizes(action_shape, &self->action_dims, self->action_shape))
        return -1;
    self->call = call;
    self->run = (run_function *)(uintptr_t)run;
    self->constants = (const void *)(uintptr_t)constants;
    self->memory = (void *)(uintptr_t)memory;
    self->state = (float *)(uintptr_t)state;
    self->size = 1;
    for (int i = 0; i < self->dims; ++i) self->size *= self->shape[i];
    self->converted = malloc((size_t)(self->size + 1) * sizeof(float));
    if (self->converted == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    self->slow = Py_NewRef(slow);
    self->owners = Py_NewRef(owners);
    return 0;
}

static int traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(((Caller *)object)->slow);
    Py_VISIT(((Caller *)object)->owners);
    return 0;
}

static int clear(PyObject *object)
{
    Py_CLEAR(((Caller *)object)->slow);
    Py_CLEAR(((Caller *)object)->owners);
    return 0;
}

static void destroy(PyObject *object)
{
    PyObject_GC_UnTrack(object);
    clear(object);
    free(((Caller *)object)->converted);
    Py_TYPE(object)->tp_free(object);
}

static PyTypeObject caller_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "rlquant_caller.Caller",
    .tp_doc = "Caller(run, constants, memory, state, shape, action_shape, action_type, slow, owners)",
    .tp_basicsize = sizeof(Caller),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Caller, call),
    .tp_call = PyVectorcall_Call,
    .tp_new = PyType_GenericNew,
    .tp_init = init,
    .tp_dealloc = destroy,
    .tp_traverse = traverse,
    .tp_clear = clear,
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "rlquant_caller", NULL, -1, NULL};

PyMODINIT_FUNC PyInit_rlquant_caller(void)
{
    PyObject *made;
    import_array();
    if (PyType_Ready(&caller_type) < 0) return NULL;
    made = PyModule_Create(&module);
    if (made == NULL) return NULL;
    if (PyModule_AddObjectRef(made, "Caller", (PyObject *)&caller_type) < 0) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
