//! Blocks of the KV cache: who uses which, and how many are promised.

/// Reference-counted blocks. Reservations count what admitted requests may still take.
pub struct Blocks {
    free: Vec<u32>,
    users: Vec<u32>,
    reserved: usize,
}

impl Blocks {
    pub fn new(count: usize) -> Blocks {
        // low numbers first, so that untouched memory stays untouched
        Blocks { free: (0..count as u32).rev().collect(), users: vec![0; count], reserved: 0 }
    }

    pub fn total(&self) -> usize {
        self.users.len()
    }

    pub fn in_use(&self) -> usize {
        self.total() - self.free.len()
    }

    /// Promises `count` blocks, if there are as many that nobody was promised.
    pub fn reserve(&mut self, count: usize) -> bool {
        let fits = self.reserved + count <= self.total();
        self.reserved += if fits { count } else { 0 };
        fits
    }

    pub fn unreserve(&mut self, count: usize) {
        self.reserved -= count;
    }

    /// A block of one's own. Within a reservation there always is one.
    pub fn allocate(&mut self) -> u32 {
        let block = self.free.pop().expect("no block beyond the reservations is ever taken");
        self.users[block as usize] = 1;
        block
    }

    /// One more user of a block.
    pub fn share(&mut self, block: u32) {
        self.users[block as usize] += 1;
    }

    pub fn release(&mut self, block: u32) {
        let users = &mut self.users[block as usize];
        *users -= 1;
        if *users == 0 {
            self.free.push(block);
        }
    }
}
