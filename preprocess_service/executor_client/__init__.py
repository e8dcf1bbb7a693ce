"""The executors: which are there, which is least loaded, and requests on their streams."""

from preprocess_service.executor_client.executor import Executor
from preprocess_service.executor_client.pool import ExecutorPool
from preprocess_service.executor_client.request import Completed, RemoteRequest, TokenOutput

__all__ = ["Completed", "Executor", "ExecutorPool", "RemoteRequest", "TokenOutput"]
