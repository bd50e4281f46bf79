export { guestMounts, guestRootDirectory, type RootfsMount, type RootfsSerials } from './guest-mounts.ts';
export {
  type LowerSource,
  planRootfs,
  type RootfsPlan,
  type SnapshotMount,
  type UpperDirectory,
  type WritableSource,
} from './plan.ts';
export {
  type Disk,
  type DiskFiles,
  type DiskRootfs,
  type PreparedRootfs,
  type PrepareOptions,
  RootfsStore,
  type RootfsStoreOptions,
  volumeRootfs,
} from './store.ts';
export { type Edits, SnapshotUpper, sizeOf } from './upper.ts';
