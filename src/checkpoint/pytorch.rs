//! `pytorch_model.bin`: a zip file with a pickle of the state dict and one stored file per storage.
//!
//! The pickle is read by a small machine that knows the operations `torch.save` writes for a dict
//! of tensors. It calls nothing: a global is only a name, and a call is only recorded if it is one
//! of the few that rebuild tensors. Everything else ends with an error.

use crate::tensor::{Bytes, DType, HostTensor};
use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;
use std::rc::Rc;

/// Deepest nesting of containers that is accepted; a state dict needs about five.
const DEPTH: usize = 32;

type Result<T> = std::result::Result<T, String>;

/// All tensors of a file; the error says what is wrong with it.
pub fn read(bytes: Bytes) -> Result<BTreeMap<String, HostTensor>> {
    if bytes.starts_with(&[0x80, 0x02, 0x8a, 0x0a]) {
        return Err(
            "is in PyTorch's format from before 1.6; load and save it with a newer PyTorch".into(),
        );
    }
    let mut zip = zip::ZipArchive::new(Cursor::new(&bytes[..]))
        .map_err(|e| format!("not a whole PyTorch zip file: {e} (download or copy it again)"))?;
    let mut files = HashMap::new();
    for i in 0..zip.len() {
        let file = zip.by_index_raw(i).map_err(|e| format!("damaged zip file: {e}"))?;
        let name = file.name().map_err(|e| format!("damaged zip file: {e}"))?.into_owned();
        let start = file.data_start().ok_or("damaged zip file: an entry has no data")? as usize;
        let end = start.checked_add(file.size() as usize).filter(|&end| end <= bytes.len());
        let end = end.ok_or_else(|| format!("{name} is cut off"))?;
        if file.compression() != zip::CompressionMethod::Stored {
            return Err(format!("{name} is compressed, expected stored"));
        }
        // entries are ARCHIVE/data.pkl, ARCHIVE/data/KEY, ...
        let name = name.split_once('/').map_or(&*name, |(_, rest)| rest).to_owned();
        files.insert(name, start..end);
    }
    let part = |name: &str| files.get(name).map(|r| bytes.slice(r.clone()));
    if part("byteorder").is_some_and(|order| order.starts_with(b"big")) {
        return Err("is stored big-endian, expected little-endian".into());
    }
    let pickle =
        part("data.pkl").ok_or("no data.pkl inside; expected a file written by torch.save")?;
    let Value::Dict(entries) = Machine::run(&pickle)? else {
        return Err("holds no dict of tensors".into());
    };
    let mut tensors = BTreeMap::new();
    for (key, value) in &entries.borrow().items {
        let (Value::Text(name), Value::Tensor(t)) = (key, value) else { continue };
        let storage = part(&format!("data/{}", t.storage.key)).ok_or_else(|| {
            format!("tensor {name}: its storage data/{} is missing", t.storage.key)
        })?;
        tensors.insert(name.to_string(), t.resolve(name, &storage)?);
    }
    if tensors.is_empty() {
        return Err("holds no tensors".into());
    }
    Ok(tensors)
}

struct StorageRef {
    dtype: DType,
    key: String,
}

struct TensorRef {
    storage: Rc<StorageRef>,
    offset: usize,
    shape: Vec<usize>,
    stride: Vec<usize>,
}

impl TensorRef {
    fn resolve(&self, name: &str, storage: &Bytes) -> Result<HostTensor> {
        let mut dense = 1usize;
        for (&size, &stride) in self.shape.iter().zip(&self.stride).rev() {
            if size > 1 && stride != dense {
                return Err(format!("tensor {name} is not contiguous (strides {:?})", self.stride));
            }
            dense = dense
                .checked_mul(size)
                .ok_or_else(|| format!("tensor {name} is impossibly large"))?;
        }
        let element = self.storage.dtype.size();
        let end = self.offset.checked_add(dense).and_then(|n| n.checked_mul(element));
        let end = end.filter(|&end| end <= storage.len()).ok_or_else(|| {
            format!(
                "tensor {name} of shape {:?} reaches beyond its storage of {} bytes",
                self.shape,
                storage.len()
            )
        })?;
        let bytes = storage.slice(self.offset * element..end);
        Ok(HostTensor { dtype: self.storage.dtype, shape: self.shape.clone(), bytes })
    }
}

#[derive(Clone)]
enum Value {
    None,
    Bool,
    Int(i64),
    Text(Rc<str>),
    Global(Rc<str>),
    /// Items and the depth of nesting below.
    Tuple(Rc<(Vec<Value>, usize)>),
    List,
    Dict(Rc<std::cell::RefCell<Dict>>),
    Storage(Rc<StorageRef>),
    Tensor(Rc<TensorRef>),
    Mark,
}

#[derive(Default)]
struct Dict {
    items: Vec<(Value, Value)>,
}

struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    memo: HashMap<usize, Value>,
}

impl<'a> Machine<'a> {
    fn run(input: &'a [u8]) -> Result<Value> {
        let mut m = Machine { input, at: 0, stack: Vec::new(), memo: HashMap::new() };
        loop {
            let op = m.byte()?;
            if op == b'.' {
                return m.pop();
            }
            if !m.literal(op)? && !m.container(op)? && !m.memo(op)? {
                return Err(
                    m.damaged(&format!("operation 0x{op:02x} does not occur in a state dict"))
                );
            }
        }
    }

    /// Operations that push a constant; `false` if this is none.
    fn literal(&mut self, op: u8) -> Result<bool> {
        match op {
            0x80 => {
                self.byte()?; // PROTO
            }
            0x95 => {
                self.take(8)?; // FRAME
            }
            b'(' => self.stack.push(Value::Mark),
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool),
            b'K' => {
                let n = self.byte()? as i64;
                self.stack.push(Value::Int(n));
            }
            b'M' => {
                let n = self.number::<2>()? as i64;
                self.stack.push(Value::Int(n));
            }
            b'J' => {
                let n = self.number::<4>()? as u32 as i32 as i64;
                self.stack.push(Value::Int(n));
            }
            0x8a => {
                let len = self.byte()? as usize;
                let digits = self.take(len)?;
                if len > 8 {
                    return Err(self.damaged("an integer is too large"));
                }
                let mut wide =
                    [if digits.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 }; 8];
                wide[..len].copy_from_slice(digits);
                self.stack.push(Value::Int(i64::from_le_bytes(wide)));
            }
            b'G' => {
                self.take(8)?; // a float: nothing here needs its value
                self.stack.push(Value::None);
            }
            b'X' => self.text::<4>()?,
            0x8c => self.text::<1>()?,
            0x8d => self.text::<8>()?,
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                self.stack.push(Value::Global(format!("{module}.{name}").into()));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(name), Value::Text(module)) = (name, module) else {
                    return Err(self.damaged("a global has no name"));
                };
                self.stack.push(Value::Global(format!("{module}.{name}").into()));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Operations that make or fill a container, or call; `false` if this is none.
    fn container(&mut self, op: u8) -> Result<bool> {
        match op {
            b'}' => self.stack.push(Value::Dict(Rc::default())),
            b']' => self.stack.push(Value::List),
            b')' => self.tuple(vec![])?,
            0x85..=0x87 => {
                let count = (op - 0x84) as usize;
                let at = self
                    .stack
                    .len()
                    .checked_sub(count)
                    .ok_or_else(|| self.damaged("the stack is empty"))?;
                let items = self.stack.split_off(at);
                self.tuple(items)?;
            }
            b't' => {
                let items = self.until_mark()?;
                self.tuple(items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(vec![key, value])?;
            }
            b'u' => {
                let items = self.until_mark()?;
                self.set(items)?;
            }
            b'a' => {
                self.pop()?;
            }
            b'e' => {
                self.until_mark()?;
            }
            b'Q' => self.storage()?,
            b'R' => self.call()?,
            b'b' => {
                self.pop()?; // BUILD: attributes of the dict, such as _metadata
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Operations on the memo; `false` if this is none.
    fn memo(&mut self, op: u8) -> Result<bool> {
        match op {
            b'q' => {
                let slot = self.byte()? as usize;
                self.store(slot)?;
            }
            b'r' => {
                let slot = self.number::<4>()? as usize;
                self.store(slot)?;
            }
            0x94 => self.store(self.memo.len())?,
            b'h' => {
                let slot = self.byte()? as usize;
                self.recall(slot)?;
            }
            b'j' => {
                let slot = self.number::<4>()? as usize;
                self.recall(slot)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn damaged(&self, what: &str) -> String {
        format!("data.pkl, byte {}: {what}", self.at)
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.input.len());
        let end = end.ok_or_else(|| self.damaged("ends too early"))?;
        let bytes = &self.input[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn number<const N: usize>(&mut self) -> Result<u64> {
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(self.take(N)?);
        Ok(u64::from_le_bytes(wide))
    }

    fn text<const N: usize>(&mut self) -> Result<()> {
        let len = self.number::<N>()?;
        let len = usize::try_from(len).map_err(|_| self.damaged("a text is too long"))?;
        let bytes = self.take(len)?;
        let text = std::str::from_utf8(bytes).map_err(|_| self.damaged("a text is not UTF-8"))?;
        self.stack.push(Value::Text(text.into()));
        Ok(())
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.input[self.at..];
        let len =
            rest.iter().position(|&b| b == b'\n').ok_or_else(|| self.damaged("ends too early"))?;
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| self.damaged("a name is not UTF-8"))
    }

    fn pop(&mut self) -> Result<Value> {
        match self.stack.pop() {
            None | Some(Value::Mark) => Err(self.damaged("the stack is empty")),
            Some(v) => Ok(v),
        }
    }

    fn until_mark(&mut self) -> Result<Vec<Value>> {
        let at = self.stack.iter().rposition(|v| matches!(v, Value::Mark));
        let at = at.ok_or_else(|| self.damaged("a mark is missing"))?;
        let items = self.stack.split_off(at + 1);
        self.stack.pop();
        Ok(items)
    }

    fn tuple(&mut self, items: Vec<Value>) -> Result<()> {
        let depth = |v: &Value| if let Value::Tuple(t) = v { t.1 } else { 0 };
        let depth = 1 + items.iter().map(depth).max().unwrap_or(0);
        if depth > DEPTH {
            return Err(self.damaged("tuples are nested too deeply"));
        }
        self.stack.push(Value::Tuple(Rc::new((items, depth))));
        Ok(())
    }

    fn store(&mut self, slot: usize) -> Result<()> {
        let top = self.stack.last().cloned().ok_or_else(|| self.damaged("the stack is empty"))?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn recall(&mut self, slot: usize) -> Result<()> {
        let value = self.memo.get(&slot).cloned();
        self.stack.push(value.ok_or_else(|| self.damaged("a memo is missing"))?);
        Ok(())
    }

    fn set(&mut self, items: Vec<Value>) -> Result<()> {
        let Some(Value::Dict(dict)) = self.stack.last() else {
            return Err(self.damaged("items are set on something that is no dict"));
        };
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            // a dict inside a dict would be metadata; keeping none of them rules out cycles
            if !matches!(value, Value::Dict(_)) {
                dict.borrow_mut().items.push((key, value));
            }
        }
        Ok(())
    }

    /// A persistent id: ('storage', torch.XStorage, key, location, elements).
    fn storage(&mut self) -> Result<()> {
        let id = self.pop()?;
        let Value::Tuple(id) = id else { return Err(self.damaged("a persistent id is no tuple")) };
        let [Value::Text(kind), Value::Global(class), Value::Text(key), ..] = &id.0[..] else {
            return Err(self.damaged("a persistent id names no storage"));
        };
        let dtype = match (&**kind, &**class) {
            ("storage", "torch.FloatStorage") => DType::F32,
            ("storage", "torch.HalfStorage") => DType::F16,
            ("storage", "torch.BFloat16Storage") => DType::Bf16,
            _ => {
                return Err(self.damaged(&format!(
                    "{class} is not supported, expected f32, f16 or bf16 storage"
                )));
            }
        };
        self.stack.push(Value::Storage(Rc::new(StorageRef { dtype, key: key.to_string() })));
        Ok(())
    }

    fn call(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (Value::Tuple(arguments), Value::Global(function)) = (arguments, function) else {
            return Err(self.damaged("a call has no function"));
        };
        let result = match (&*function, &arguments.0[..]) {
            ("collections.OrderedDict", _) => Value::Dict(Rc::default()),
            ("torch._utils._rebuild_parameter", [Value::Tensor(t), ..]) => Value::Tensor(t.clone()),
            (
                "torch._utils._rebuild_tensor_v2",
                [
                    Value::Storage(s),
                    Value::Int(offset),
                    Value::Tuple(shape),
                    Value::Tuple(stride),
                    ..,
                ],
            ) => {
                let sizes = |t: &Rc<(Vec<Value>, usize)>| -> Option<Vec<usize>> {
                    let size = |v: &Value| {
                        if let Value::Int(n) = v { usize::try_from(*n).ok() } else { None }
                    };
                    t.0.iter().map(size).collect()
                };
                let (Some(shape), Some(stride), Ok(offset)) =
                    (sizes(shape), sizes(stride), usize::try_from(*offset))
                else {
                    return Err(self.damaged("a tensor has a negative size"));
                };
                if shape.len() != stride.len() {
                    return Err(self.damaged("a tensor's shape and strides differ in length"));
                }
                Value::Tensor(Rc::new(TensorRef { storage: s.clone(), offset, shape, stride }))
            }
            _ => {
                return Err(self
                    .damaged(&format!("calls {function}, which does not occur in a state dict")));
            }
        };
        self.stack.push(result);
        Ok(())
    }
}
