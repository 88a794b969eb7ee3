//! Prompt pairs: records, and how they are made from plain lists of prompts.

pub mod near_duplicates;
pub mod pairs;
pub mod phrases;
pub mod records;
pub mod scored;
pub mod tails;
