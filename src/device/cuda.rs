//! The CUDA driver, through cudarc, which looks for it at run time.

use super::staging::{self, Slot, Staging};
use super::{
    Address, Args, LaunchConfig, Launcher, Limits, TensorMap, TensorMapConfig, images,
    not_capturable,
};
use crate::error::{Error, Result};
use cudarc::driver::{result, sys};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, c_void};

/// The least driver that the kernels' machine code loads with: that of CUDA 13.0.
const DRIVER: i32 = 13000;

/// Set to 0, leaves the kernels with Hopper's own instructions alone.
const HOPPER: &str = "BPROMPT_HOPPER";

/// One GPU and one stream of work on it.
pub struct Driver {
    /// The GPU's name as the driver reports it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// All memory of the GPU, in bytes.
    pub memory_bytes: usize,
    limits: Limits,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    functions: RefCell<HashMap<String, Function>>,
    staging: Staging,
    capturing: Cell<bool>,
    /// Whether kernels may begin while the ones before them end.
    overlap: Cell<bool>,
    /// See [`Launcher::allocation_epoch`].
    allocation_epoch: Cell<u64>,
}

/// A CUDA graph, ready to be launched.
pub struct Graph(sys::CUgraphExec);

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in `Driver::record`; the driver lets a launched graph end before it goes.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory that it may have by now; 0 before its first use.
    shared_bytes: u32,
}

/// Names what failed and the driver's reason.
pub(super) fn failed(what: impl std::fmt::Display) -> impl FnOnce(result::DriverError) -> Error {
    move |e| {
        let reason = e
            .error_string()
            .map(|s| s.to_string_lossy().into_owned())
            .unwrap_or_else(|_| format!("{e:?}"));
        Error::Cuda(format!("{what}: {reason}"))
    }
}

/// What a context's kernels run on and are found by.
type Loaded = (sys::CUstream, Vec<sys::CUmodule>, HashMap<String, Function>);

/// Makes a GPU's context current and loads its kernels.
fn load(device: sys::CUdevice, images: Vec<&'static images::Image>) -> Result<Loaded> {
    // SAFETY: plain calls of the driver; images end as it expects.
    unsafe {
        let context = result::primary_ctx::retain(device).map_err(failed("no context"))?;
        result::ctx::set_current(context).map_err(failed("no context"))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("no stream"))?;
        let (mut modules, mut functions) = (Vec::new(), HashMap::new());
        for i in images {
            let what = || failed(format!("kernels of {} for {}", i.name, i.arch));
            let module = result::module::load_data(i.bytes.as_ptr().cast()).map_err(what())?;
            modules.push(module);
            functions.extend(functions_of(module).map_err(what())?);
        }
        Ok((stream, modules, functions))
    }
}

impl Driver {
    /// Whether this program could use a GPU and the machine has a driver for one: if
    /// [`Driver::open`] fails then, it is worth a word.
    pub fn likely() -> bool {
        // SAFETY: only looks whether the library is there.
        !images::IMAGES.is_empty() && unsafe { sys::is_culib_present() }
    }

    /// Fails if this build, the machine or its driver cannot run the kernels.
    fn check_driver() -> Result<()> {
        if images::IMAGES.is_empty() {
            return Err(Error::Unsupported(
                "this program was built without CUDA kernels: install nvcc (pip install -r \
                kernels/requirements.txt), set NVCC to its path and build again; or use \
                --device cpu"
                    .into(),
            ));
        }
        // SAFETY: only looks whether the library is there; without it the calls below would panic.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Unsupported(
                "CUDA: there is no NVIDIA driver (libcuda) on this machine; install one or use \
                --device cpu"
                    .into(),
            ));
        }
        let mut version = 0;
        // SAFETY: plain calls of the driver with valid pointers, here and below.
        unsafe {
            sys::cuDriverGetVersion(&mut version)
                .result()
                .map_err(failed("the driver's version"))?
        };
        if version < DRIVER {
            return Err(Error::Unsupported(format!(
                "CUDA: the driver is made for CUDA {}.{}, the kernels need {}.{} (driver 580 or \
                later); update it or \
                 use --device cpu",
                version / 1000,
                version % 1000 / 10,
                DRIVER / 1000,
                DRIVER % 1000 / 10
            )));
        }
        result::init().map_err(failed("the driver does not start"))?;
        if result::device::get_count().map_err(failed("the number of GPUs"))? == 0 {
            return Err(Error::Unsupported(
                "CUDA: the driver sees no GPU; use --device cpu".into(),
            ));
        }
        Ok(())
    }

    /// The first GPU; `CUDA_VISIBLE_DEVICES` chooses another.
    ///
    /// # Errors
    /// If there is none that this program has kernels for.
    pub fn open() -> Result<Driver> {
        Driver::open_for_rank(0)
    }

    /// The GPU of one of several ranks on this machine: the one with its number, or the only one
    /// that the rank is shown.
    ///
    /// # Errors
    /// As for [`Driver::open`], and if there are fewer.
    pub fn open_for_rank(local_rank: usize) -> Result<Driver> {
        Driver::check_driver()?;
        let gpus = result::device::get_count().map_err(failed("the number of GPUs"))? as usize;
        if gpus > 1 && local_rank >= gpus {
            return Err(Error::Unsupported(format!(
                "CUDA: LOCAL_RANK is {local_rank}, the driver sees {gpus} GPUs; start one rank \
                for each"
            )));
        }
        let ordinal = if gpus == 1 { 0 } else { local_rank as i32 };
        let device = result::device::get(ordinal).map_err(failed("a GPU"))?;
        use sys::CUdevice_attribute as A;
        let attribute = |a: A| -> Result<u32> {
            // SAFETY: the device is one of the driver's.
            let value = unsafe { result::device::get_attribute(device, a) };
            value.map(|v| v as u32).map_err(failed("a GPU's properties"))
        };
        let name = result::device::get_name(device).map_err(failed("a GPU's name"))?;
        let capability = (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let Some(images) = images::for_gpu(capability) else {
            return Err(Error::Unsupported(format!(
                "CUDA: {name} has compute capability {}.{}; this program has kernels for {}; build \
                with BPROMPT_CUDA_ARCHS, or \
                 use --device cpu",
                capability.0,
                capability.1,
                images::architectures().join(", ")
            )));
        };
        let limits = Limits {
            shared_bytes: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            processors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            hopper: images.iter().any(|i| i.arch == "sm_90a")
                && std::env::var_os(HOPPER).is_none_or(|v| v != "0"),
        };
        // SAFETY: the device is one of the driver's.
        let memory_bytes = unsafe { result::device::total_mem(device) };
        let memory_bytes = memory_bytes.map_err(failed("the GPU's memory"))?;
        let (stream, modules, functions) = load(device, images)?;
        let (functions, staging) = (RefCell::new(functions), Staging::default());
        let (capturing, allocation_epoch) = (Cell::new(false), Cell::new(0));
        let overlap = Cell::new(true);
        Ok(Driver {
            name,
            capability,
            memory_bytes,
            limits,
            stream,
            modules,
            functions,
            staging,
            capturing,
            overlap,
            allocation_epoch,
        })
    }

    fn function(&self, kernel: &str) -> Result<Function> {
        let function = self.functions.borrow().get(kernel).copied();
        let mut function =
            function.ok_or_else(|| Error::Cuda(format!("there is no kernel {kernel}")))?;
        if function.shared_bytes == 0 {
            // all for shared memory, in percent: blocks of the larger kernels fit twice, and
            // kernels for which multiprocessors are divided alike can overlap
            use sys::CUfunction_attribute_enum as Attribute;
            const PART: Attribute = Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            // SAFETY: the module is loaded.
            unsafe { result::function::set_function_attribute(function.handle, PART, 100) }
                .map_err(failed(kernel))?;
            function.shared_bytes = 48 * 1024;
            self.functions.borrow_mut().insert(kernel.to_owned(), function);
        }
        Ok(function)
    }
}

/// The kernels of a module by their names. They are loaded as they are used.
unsafe fn functions_of(
    module: sys::CUmodule,
) -> std::result::Result<Vec<(String, Function)>, result::DriverError> {
    let mut count = 0;
    // SAFETY: plain calls of the driver; the list has room for as many as there are, and names live
    // as long as the module.
    unsafe {
        sys::cuModuleGetFunctionCount(&mut count, module).result()?;
        let mut handles: Vec<sys::CUfunction> = vec![std::ptr::null_mut(); count as usize];
        sys::cuModuleEnumerateFunctions(handles.as_mut_ptr(), count, module).result()?;
        let named = |handle| {
            let mut name = std::ptr::null();
            sys::cuFuncGetName(&mut name, handle).result()?;
            let name = CStr::from_ptr(name).to_string_lossy().into_owned();
            Ok((name, Function { handle, shared_bytes: 0 }))
        };
        handles.into_iter().map(named).collect()
    }
}

impl Driver {
    /// The stream that all work is done on.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Refuses what would become a part of a graph.
    fn only_now(&self, what: &str) -> Result<()> {
        if self.capturing.get() { Err(not_capturable(what)) } else { Ok(()) }
    }
}

impl Launcher for Driver {
    type CapturedGraph = Graph;
    /// With its length.
    type PendingRead = (Slot, usize);

    fn limits(&self) -> Limits {
        self.limits
    }

    fn free_memory(&self) -> Option<u64> {
        result::mem_get_info().ok().map(|(free, _)| free as u64)
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.only_now("memory")?;
        self.allocation_epoch.set(self.allocation_epoch.get() + 1);
        // SAFETY: plain calls of the driver, here and below.
        unsafe { result::malloc_async(self.stream, bytes.max(1)) }.map_err(|e| {
            let (free, total) = result::mem_get_info().unwrap_or_default();
            let what = format!(
                "no {} MiB more on {} ({} of {} MiB free)",
                bytes.div_ceil(1 << 20),
                self.name,
                free >> 20,
                total >> 20
            );
            match failed(what)(e) {
                Error::Cuda(what) if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    Error::DeviceOutOfMemory(what)
                }
                other => other,
            }
        })
    }

    fn free(&self, at: Address) {
        self.allocation_epoch.set(self.allocation_epoch.get() + 1);
        // what fails here has failed before and was reported then
        // SAFETY: the address was allocated here and is given up.
        let _ = unsafe { result::free_async(at, self.stream) };
    }

    fn write(&self, at: Address, bytes: &[u8]) -> Result<()> {
        self.only_now("a copy")?;
        if bytes.len() <= staging::MAX_COPY {
            return self.staging.write(at, bytes, self.stream).map_err(failed("a copy to the GPU"));
        }
        // pageable memory: the driver has taken the bytes when the call returns
        // SAFETY: whoever holds an address has as many bytes there.
        unsafe { result::memcpy_htod_async(at, bytes, self.stream) }
            .map_err(failed("a copy to the GPU"))
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<()> {
        self.only_now("zeroed memory")?;
        // SAFETY: as for a write.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }
            .map_err(failed("zeroing memory"))
    }

    fn read(&self, at: Address, bytes: &mut [u8]) -> Result<()> {
        self.only_now("a copy")?;
        // SAFETY: the bytes are there until the stream has been waited for.
        unsafe {
            result::memcpy_dtoh_async(bytes, at, self.stream)
                .map_err(failed("a copy from the GPU"))?;
            result::stream::synchronize(self.stream).map_err(failed("a kernel failed"))
        }
    }

    fn read_later(&self, at: Address, bytes: usize) -> Result<(Slot, usize)> {
        self.only_now("a copy")?;
        Ok((
            self.staging.read(at, bytes, self.stream).map_err(failed("a copy from the GPU"))?,
            bytes,
        ))
    }

    fn finish_read(&self, (slot, bytes): (Slot, usize)) -> Result<Vec<u8>> {
        self.staging.finish(slot, bytes).map_err(failed("a kernel failed"))
    }

    fn launch(&self, kernel: &str, config: LaunchConfig, args: &Args) -> Result<()> {
        let mut function = self.function(kernel)?;
        if config.shared_bytes > function.shared_bytes {
            use sys::CUfunction_attribute_enum as Attribute;
            const MAX: Attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the module is loaded.
            unsafe {
                result::function::set_function_attribute(
                    function.handle,
                    MAX,
                    config.shared_bytes as i32,
                )
            }
            .map_err(failed(format!("{kernel}: {} bytes of shared memory", config.shared_bytes)))?;
            function.shared_bytes = config.shared_bytes;
            self.functions.borrow_mut().insert(kernel.to_owned(), function);
        }
        let mut parameters: Vec<*mut c_void> =
            args.iter().map(|a| a.as_ptr().cast_mut().cast()).collect();
        let [x, y, z] = config.grid;
        let launched = if self.capability.0 >= 9 || config.cooperative {
            use sys::CUlaunchAttributeID as Id;
            // SAFETY: attributes are plain data, for which zeros are a value.
            let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
            let mut count = 0;
            if config.cooperative {
                attributes[0].id = Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
                attributes[0].value.cooperative = 1;
                count = 1;
            } else if self.overlap.get() {
                // may begin while the kernel before it ends: kernels wait before they read what it
                // wrote
                attributes[0].id = Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
                attributes[0].value.programmaticStreamSerializationAllowed = 1;
                count = 1;
            }
            if config.cluster > 1 {
                use sys::CUlaunchAttributeValue_union__bindgen_ty_1 as Blocks;
                attributes[count].id = Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
                attributes[count].value.clusterDim = Blocks { x: config.cluster, y: 1, z: 1 };
                count += 1;
            }
            let config = sys::CUlaunchConfig {
                gridDimX: x,
                gridDimY: y,
                gridDimZ: z,
                blockDimX: config.threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: config.shared_bytes,
                hStream: self.stream,
                attrs: attributes.as_mut_ptr(),
                numAttrs: count as u32,
            };
            let none = std::ptr::null_mut();
            // SAFETY: the arguments are those of the kernel; who launches it vouches for what they
            // point to.
            unsafe {
                sys::cuLaunchKernelEx(&config, function.handle, parameters.as_mut_ptr(), none)
            }
            .result()
        } else {
            let threads = (config.threads, 1, 1);
            // SAFETY: as above.
            unsafe {
                let shared = config.shared_bytes;
                result::launch_kernel(
                    function.handle,
                    (x, y, z),
                    threads,
                    shared,
                    self.stream,
                    &mut parameters,
                )
            }
        };
        launched.map_err(failed(format!("launch of {kernel} as {config:?}")))
    }

    fn capture(&self, work: &mut dyn FnMut() -> Result<()>, overlap: bool) -> Result<Graph> {
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as MODE;
        // SAFETY: plain calls of the driver; the graph that was captured is ours to destroy.
        unsafe { result::stream::begin_capture(self.stream, MODE) }
            .map_err(failed("capturing launches"))?;
        self.capturing.set(true);
        self.overlap.set(overlap);
        let done = work();
        self.overlap.set(true);
        self.capturing.set(false);
        // ended in any case, or the stream would stay in it
        // SAFETY: the capture was begun above.
        let graph = unsafe { result::stream::end_capture(self.stream) }
            .map_err(failed("capturing launches"));
        let mut exec = std::ptr::null_mut();
        let made = graph.and_then(|graph| {
            let made = match &done {
                // SAFETY: the graph was captured above.
                Ok(()) => unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) }.result(),
                Err(_) => Ok(()),
            };
            // SAFETY: nobody else has the graph.
            unsafe { result::graph::destroy(graph) }.and(made).map_err(failed("a CUDA graph"))
        });
        done?;
        made?;
        Ok(Graph(exec))
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        // SAFETY: the graph is whole, and its memory has not moved.
        unsafe { result::graph::launch(graph.0, self.stream) }
            .map_err(failed("launch of a CUDA graph"))
    }

    fn timed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        use sys::CUevent_flags_enum::CU_EVENT_DEFAULT as FLAGS;
        let what = || failed("a measurement");
        let [start, end] = [result::event::create(FLAGS), result::event::create(FLAGS)];
        let (start, end) = (start.map_err(what())?, end.map_err(what())?);
        // SAFETY: both events were made above.
        unsafe {
            result::event::record(start, self.stream).map_err(what())?;
            let done = work();
            result::event::record(end, self.stream).map_err(what())?;
            result::event::synchronize(end).map_err(what())?;
            let milliseconds = result::event::elapsed(start, end).map_err(what());
            let _ = (result::event::destroy(start), result::event::destroy(end));
            done?;
            Ok(milliseconds? as f64 / 1e3)
        }
    }

    fn allocation_epoch(&self) -> u64 {
        self.allocation_epoch.get()
    }

    fn tensor_map(&self, config: &TensorMapConfig) -> Result<TensorMap> {
        use sys::CUtensorMapSwizzle as Swizzle;
        let swizzles = [
            Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        ];
        // SAFETY: the driver writes the whole map.
        let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
        // SAFETY: all pointers are valid for the call.
        let done = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                config.global_dim.len() as u32,
                config.address as *mut c_void,
                config.global_dim.as_ptr(),
                &config.global_stride,
                config.box_dim.as_ptr(),
                config.element_strides.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzles[config.swizzle as usize],
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        done.result().map_err(failed(format!("{config:?}")))?;
        Ok(TensorMap(map.opaque))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: made in `open`; nothing is launched any more.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            self.staging.clear();
            for module in &self.modules {
                let _ = result::module::unload(*module);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}
